"""How far Lightning has come in a fit, by the counters that it saves with a checkpoint."""

from lightning.pytorch import Trainer


def training_epoch(trainer: Trainer) -> int:
    """The epoch that Lightning tells samplers.

    ``trainer.current_epoch`` is one behind it when a run of ``max_steps`` goes on from a checkpoint of an epoch's end.
    """
    return trainer.fit_loop.epoch_progress.current.processed


class Progress:
    """The batches of the epoch that a trainer is in.

    Args:
        trainer: of a fit.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    @property
    def batches(self) -> int:
        """Those that the model was trained on; one that was fetched and then failed is not among them."""
        return self._batches.current.processed

    def within(self, epoch: int) -> bool:
        """Whether what was loaded from a checkpoint is in the middle of an epoch."""
        return training_epoch(self.trainer) == epoch and not self._batches.is_last_batch

    def move(self, by: int) -> None:
        """Count more or fewer batches, where those of the rest of the epoch have another size."""
        current = self._batches.current
        for name in ("ready", "started", "processed", "completed"):
            setattr(current, name, getattr(current, name) + by)

    @property
    def _batches(self):  # type: ignore[no-untyped-def]  # Lightning's class is private
        return self.trainer.fit_loop.epoch_loop.batch_progress
