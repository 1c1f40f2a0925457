"""Ahead of time: all that a configuration would look up, encoded by Lightning's ``predict`` and nothing else done.

An entry that is there is read, and its image is not opened: a run that was stopped goes on where it was.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader

from latentdm.batch import CAPTION, LATENTS
from latentdm.cache.cache import Cache
from latentdm.cache.samples import CAPTIONS, CachedCrops, parts_of
from latentdm.cache.wanted import WHOLE, Jobs, Part, Passed, StreamJobs, collate_missing
from latentdm.captions import Captions
from latentdm.data.dataset import Sample
from latentdm.data.module import PixelDataModule
from latentdm.data.stream import StreamImages
from latentdm.draws import Draws
from latentdm.errors import UserError
from latentdm.stages import Stage

REMEMBERED = 100_000
"""Captions that are known to be there and not looked up again."""


def ready_to_fill(datamodule: Any, device: torch.device | str) -> "FillData":
    """Let a `latentdm.LatentDataModule` predict all that it would look up, without a trainer."""
    datamodule.pixels = pixels = FillData(datamodule.pixels)
    pixels.setup()
    datamodule.line.setup(device)
    datamodule.cache.setup(datamodule)
    return pixels


class FillData(PixelDataModule):
    """Stands in for a data module of ours and predicts all that it would look up.

    Args:
        pixels: the data module.
        part: see `Part`.
        caption: the column of the captions, where these are encoded as well.
    """

    def __init__(self, pixels: PixelDataModule, part: Part = WHOLE, caption: str | None = None) -> None:
        super().__init__(pixels.batch_size, pixels.num_workers, pixels.seed, "skip", 1.0)
        self.inner = pixels
        self.part = part
        self.caption = caption

    def prepare_data(self) -> None:
        """Delegates."""
        self.inner.prepare_data()

    def setup(self, stage: str = "predict") -> None:
        """Delegates."""
        self.inner.setup(stage)
        self.train_set, self.val_set = self.inner.train_set, self.inner.val_set

    def able(self) -> list[Any]:
        """The data sets that look up; UserError: none does."""
        parts = [
            part for dataset in (self.train_set, self.val_set) if dataset is not None for part in parts_of(dataset)
        ]
        able: list[Any] = [part for part in parts if isinstance(getattr(part, "crops", None), CachedCrops)]
        if not able:
            raise UserError(f"{type(self.inner).__name__}: nothing of it can be cached; the warning says why")
        for dataset in able:
            # Nobody looks at what is there.
            dataset.crops.plan = replace(dataset.crops.plan, needs_pixels=False, caption=self.caption)
        return able

    def predict_dataloader(self) -> DataLoader[Sample]:
        """Everything that the data sets would look up."""
        able = self.able()
        if not any(isinstance(dataset, StreamImages) for dataset in able):
            self.predict_set = Jobs(able, self.part)
            return self._loader(self.predict_set, training=False)
        ranks = self._ranks()
        jobs = StreamJobs(able, self.part, ranks["rank"], ranks["num_replicas"])
        jobs.skips = self._skips()
        return DataLoader(jobs, self.batch_size, num_workers=self.num_workers, collate_fn=collate_missing)

    def teardown(self, stage: str) -> None:
        """Says nothing: what could not be read is in the report."""


class Fill(LightningModule):
    """A model that does nothing, for ``Trainer.predict``.

    Args:
        cache: that is filled.
        captions: what is done to captions in training.

    Attributes:
        totals: of all ranks, once it has ended: images encoded, ``hits``, ``misses``, ``failures``, ``dropped``.
    """

    def __init__(self, cache: Cache, captions: Stage | None = None) -> None:
        super().__init__()
        self.cache = cache
        self.captions = captions
        self.images = 0
        self.totals: dict[str, int] = {}
        self._known: set[str] = set()
        if cache.text is not None:
            cache.text.waits = True

    def predict_step(self, batch: Any, batch_idx: int) -> int:
        """Count, and encode the captions of the images; returns the images encoded."""
        if isinstance(batch, Passed):
            self.cache.hits += batch.entries
            self._encode(batch.captions)
            return 0
        self.images += len(batch[LATENTS])
        self._encode(batch.get(CAPTIONS, []))
        return len(batch[LATENTS])

    def _encode(self, captions: Sequence[Sequence[Any]]) -> None:
        """Everything that may come of the captions of some images."""
        if self.cache.text is None or not captions:
            return
        texts = [text for one in captions for caption in one for text in possible_captions(self.captions, caption)]
        if new := list(dict.fromkeys(text for text in texts if text not in self._known)):
            self.cache.text.fill(new)
            if len(self._known) > REMEMBERED:
                self._known.clear()
            self._known.update(new)

    def on_predict_end(self) -> None:
        """Write the last entries, and add up what all ranks did."""
        self.cache.flush()
        mine = self.cache.report() | {"images": self.images}
        counts = torch.tensor(list(mine.values()), dtype=torch.int64, device=self.device)
        added: Any = self.trainer.strategy.reduce(counts, reduce_op="sum")
        self.totals = dict(zip(mine, added.tolist(), strict=True))
        self.trainer.strategy.barrier()


def possible_captions(stage: Stage | None, caption: Any) -> list[str]:
    """All that training may make of a caption; of shuffled tags their own order, of foreign stages what comes first.

    Args:
        stage: of the data module.
        caption: of an image: a text, several, or None.
    """
    if stage is None:
        return list(caption) if isinstance(caption, list | tuple) else [caption or ""]
    if isinstance(stage, Captions):
        return stage.possible(caption)
    made: list[str] = stage({CAPTION: [caption]}, Draws(0, 0, [0], training=False))[CAPTION]
    return made
