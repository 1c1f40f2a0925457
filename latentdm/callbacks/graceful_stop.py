"""`GracefulStop`: a run that is told to stop ends after its step, on all ranks alike, and its exit status says so."""

import signal
from collections.abc import Callable
from threading import current_thread, main_thread
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

from latentdm.errors import UserError

STATUS = 128
"""A process that a signal ended has this plus the signal's number as its exit status, in a shell's eyes."""


class GracefulStop(Callback):
    """SIGTERM or Ctrl+C ends a run after the step that it is in, on every rank, with exit status 143 or 130.

    With ``ModelCheckpoint(save_on_exception=True)`` the state after that step is saved, and ``ckpt_path="last"`` goes
    on from there. A second Ctrl+C ends the run at once. Outside of training the run ends after the batch; on several
    ranks, which need not have equally many, after the validation.

    Lightning alone stops a single process in the same way after SIGTERM, but with status 0, and forgets a signal that
    comes in the last batch of a validation. Of several ranks it asks for agreement from inside the signal's handler,
    in the middle of whatever the other ranks are doing: they may wait for each other for good. Here a signal is only
    noted, and at the end of each step all ranks learn whether one of them was told to stop.

    An error on one of several ranks is not saved, as saving is work for all of them, of which the others know nothing:
    they would wait. They end with an error as soon as they miss that rank: at once where its process ended, and where
    it hangs after the ``timeout`` of the trainer's strategy (``trainer.strategy.timeout.seconds`` of ``trainer=ddp``).

    Attributes:
        told: the signal that told this process to stop; None as long as none did.

    Example:
        >>> stop, save = GracefulStop(), ModelCheckpoint("run", save_last=True, save_on_exception=True)
        >>> Trainer(callbacks=[stop, save]).fit(model, datamodule=dm, ckpt_path="last")  # doctest: +SKIP
    """

    def __init__(self) -> None:
        self.told: signal.Signals | None = None
        self._stop: Callable[[int, Any], Any] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals over from Lightning, which takes them back at the end of the stage."""
        stop = signal.getsignal(signal.SIGTERM)
        if current_thread() is not main_thread() or not callable(stop) or stop == self._note:
            return  # where Lightning has no handler either, or within a fit that has done this
        self._stop = stop
        signal.signal(signal.SIGTERM, self._note)
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as in the background of a shell
            signal.signal(signal.SIGINT, self._note)

    # Whichever comes first: Lightning has its own handler after `setup` alone.
    on_sanity_check_start = on_validation_start = on_test_start = on_predict_start = on_train_start

    def _note(self, number: int, frame: Any) -> None:
        """The signals' handler."""
        if number == signal.SIGINT == self.told:
            signal.default_int_handler(number, frame)
        self.told = signal.Signals(number)

    def _agree(self, trainer: Trainer) -> None:
        """Let Lightning stop the run if any rank was told to; every rank asks at the same place."""
        if self._stop is None or trainer.received_sigterm:
            return
        if trainer.strategy.reduce_boolean_decision(self.told is not None, all=False):
            self.told = self.told or signal.SIGTERM
            self._stop(signal.SIGTERM, None)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop after this step if a rank was told to."""
        self._agree(trainer)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop after this batch; several ranks need not have equally many."""
        if trainer.world_size == 1:
            self._agree(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop after this validation."""
        self._agree(trainer)

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end
    on_test_end = on_predict_end = on_validation_end

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop between two stages: Lightning would forget the signal, and go on with the next one."""
        self._agree(trainer)
        if trainer.received_sigterm:
            raise SIGTERMException

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Set the exit status; keep a rank that fails alone from saving with the others."""
        if isinstance(exception, SIGTERMException):
            told = self.told or signal.SIGTERM
            exception.code = STATUS + told
            rank_zero_info(f"GracefulStop: stopped by {told.name} after step {trainer.global_step}")
        elif trainer.world_size > 1:
            for callback in trainer.checkpoint_callbacks:
                if isinstance(callback, ModelCheckpoint):
                    callback.save_on_exception = False
            if isinstance(exception, RuntimeError) and not isinstance(exception, UserError):
                exception.add_note(
                    "GracefulStop: on several ranks this is most often an echo: another rank ended, whose own output "
                    "says why, or did not answer within the strategy's timeout. The last checkpoint is what was saved "
                    "before; go on with ckpt_path=last"
                )
