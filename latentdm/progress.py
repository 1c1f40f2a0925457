"""How far a fit has come by Lightning's counters, which it saves with a checkpoint; and where they mislead it, mended.

What Lightning does with the counters of a checkpoint depends on the hook in which it was saved. These go wrong:

- saved at an epoch's end, a run of ``max_steps`` counts the epoch that follows as over after one batch, or none;
- so does any run whose checkpoint was saved where an epoch begins;
- after the last batch of an epoch, and after one that failed, a total stays behind the others for good, and the next
  checkpoint is taken for one of another hook.
"""

from typing import Any

from lightning.pytorch import Trainer


def training_epoch(trainer: Trainer) -> int:
    """The epoch that Lightning tells samplers.

    ``trainer.current_epoch`` may be one behind it in a run of ``max_steps`` that goes on from an epoch's end.
    """
    epoch: int = _epochs(trainer).current.processed
    return epoch


class Progress:
    """The counters of a trainer's epochs and batches.

    Args:
        trainer: of a fit.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    @property
    def batches(self) -> int:
        """Those of this epoch that the model was trained on; one that was fetched and then failed is not among them."""
        count: int = self._batches.current.processed
        return count

    def within(self, epoch: int) -> bool:
        """Whether the checkpoint that was loaded leaves batches of an epoch to come."""
        return training_epoch(self.trainer) == epoch and not self._batches.is_last_batch

    def loaded(self, epoch: int) -> None:
        """Where a checkpoint was loaded whose loaders were in ``epoch``: if that is over, let the next one be whole."""
        epochs = _epochs(self.trainer)
        if training_epoch(self.trainer) <= epoch:
            return
        for counts in (epochs.current, epochs.total):
            counts.completed = counts.processed
        self._batches.reset_on_run()
        self.trainer.fit_loop.epoch_loop.restarting = False

    def began(self) -> None:
        """Before the first batch of a fit or an epoch: let the totals agree."""
        epochs, batches = _epochs(self.trainer), self._batches
        if batches.current.ready != batches.current.completed or epochs.current.processed != epochs.current.completed:
            return  # somebody else asks for batches, in the middle of a step or between two epochs
        for counts in (epochs.current, epochs.total):
            counts.ready = counts.started = counts.processed + 1
        batches.total.ready = batches.total.started = batches.total.completed = batches.total.processed

    def move(self, by: int) -> None:
        """Count more or fewer batches, where those of the rest of the epoch have another size."""
        current = self._batches.current
        for name in ("ready", "started", "processed", "completed"):
            setattr(current, name, getattr(current, name) + by)

    @property
    def _batches(self) -> Any:
        return self.trainer.fit_loop.epoch_loop.batch_progress


def _epochs(trainer: Trainer) -> Any:
    return trainer.fit_loop.epoch_progress
