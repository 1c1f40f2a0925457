"""The data modules' base: settings, loaders, and the report of what was skipped."""

from contextlib import suppress
from inspect import signature
from pathlib import Path
from tempfile import gettempdir
from typing import Any
from uuid import uuid4

import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader

from latentdm.data.dataset import PixelDataset, Sample
from latentdm.data.files import READ_TIMEOUT_S
from latentdm.data.geometry import ResizeCrop, Target, square
from latentdm.data.loader import PixelLoader, explanation
from latentdm.data.order import GlobalOrder, InOrder, RankBatches
from latentdm.data.reading import Reading
from latentdm.data.skips import SampleError, Skips
from latentdm.draws import sample_seed
from latentdm.errors import UserError, attributed
from latentdm.progress import Progress
from latentdm.ranks import process_ranks
from latentdm.shown import one_line
from latentdm.validation import Check

ON_ERROR = ("raise", "skip")

FREE = ("self", "batch_size", "num_workers", "on_error", "max_skipped_share")
"""Arguments that may change in a run that goes on; of the batch size `PixelLoader` tells by itself."""

MAX_EXAMPLES = 8
"""How many samples are tried for one that can be read."""


class PixelDataModule(LightningDataModule):
    """The base of the pixel data modules: a subclass sets its datasets in ``setup``, the loaders are made here.

    A batch holds ``pixels`` uint8 ``b c h w`` (a quarter of the bytes of float32, and Lightning does not cast it),
    ``index`` int64 ``b``, ``name`` (a list of strings), where the data have them ``mask`` uint8 ``b 1 h w`` and
    ``source`` uint8 ``b 3 h w``, and any other column: numbers as a tensor ``b``, all else as a list. Our own data
    modules add ``original_size``, ``crop_top_left`` (in the resized image) and ``target_size``: int64 ``b 2``, rows
    first, for SDXL's micro-conditioning. Images are laid out channels-last, as decoders give them and as convolutions
    are fastest.

    Training drops its last batch where that is incomplete and another is left; every rank has equally many batches.
    Where samples differ in size, each batch is of one bucket: see `latentdm.data.order.GlobalOrder`.
    Validation keeps every sample, in order. On several ranks the first few are repeated until the number divides by
    the ranks, so a mean over them differs by those few from the mean on one device.

    Args:
        batch_size: samples a batch, on each device.
        num_workers: processes that read images; 0 reads in the training process. The samples are the same.
        seed: the order and the crops follow from it.
        on_error: what happens to a sample that cannot be read: ``"raise"`` an error that names it, or ``"skip"``:
            another sample, drawn from (epoch, position), replaces it, and a report at the end lists what was skipped.
        max_skipped_share: with ``skip``: an error all the same when more than this share of the samples is broken.
        read_timeout: seconds that the reading of a file may wait for its storage, all waiting together; of a shard,
            each reading. Then the sample counts as one that cannot be read. A process of ``num_workers`` that does not
            get any further for so long ends the run with an error that says what it was reading.

    Attributes:
        masks_unused: why the masks of the data have no effect, for the line that `summary` gives; "" where they may.
        train_set: the dataset of ``fit``.
        val_set: the dataset of ``validate``; None: no validation.
        test_set: the dataset of ``test``.
        predict_set: the dataset of ``predict``.

    Raises:
        ValueError: a setting is out of range.
    """

    masks_unused: str = ""
    train_set: PixelDataset | None = None
    val_set: PixelDataset | None = None
    test_set: PixelDataset | None = None
    predict_set: PixelDataset | None = None

    def __init__(
        self,
        batch_size: int,
        num_workers: int = 0,
        seed: int = 0,
        on_error: str = "raise",
        max_skipped_share: float = 0.05,
        read_timeout: float = READ_TIMEOUT_S,
    ) -> None:
        super().__init__()
        check = Check(type(self).__name__)
        self.batch_size = check.integer("batch_size", batch_size, 1)
        self.num_workers = check.integer("num_workers", num_workers, 0)
        self.seed = check.integer("seed", seed, 0)
        self.on_error = check.choice("on_error", on_error, ON_ERROR)
        self.max_skipped_share = check.number("max_skipped_share", max_skipped_share, 0, 1)
        self.read_timeout = check.number("read_timeout", read_timeout, 0.01)
        self.skips: Skips | None = None

    def __repr__(self) -> str:
        return one_line(self)

    def train_dataloader(self) -> DataLoader[Sample]:
        """Shuffled batches; ValueError if there is nothing to train on."""
        return self._loader(self._needed("train_set"), training=True)

    def val_dataloader(self) -> DataLoader[Sample] | list[DataLoader[Sample]]:
        """Batches in order; without a validation set no loader, of which Lightning makes sure with a warning."""
        return [] if self.val_set is None else self._loader(self.val_set, training=False)

    def test_dataloader(self) -> DataLoader[Sample]:
        """Batches in order; ValueError if there is nothing to test on."""
        return self._loader(self._needed("test_set"), training=False)

    def predict_dataloader(self) -> DataLoader[Sample]:
        """Batches in order; ValueError if there is nothing to predict."""
        return self._loader(self._needed("predict_set"), training=False)

    def example(self) -> Sample | None:
        """A training sample, to see what samples hold; None where none can be read, or a stream would begin."""
        dataset = self.train_set
        if dataset is None or dataset.parts is not None:
            return None
        for position in range(min(len(dataset), MAX_EXAMPLES)):
            with suppress(SampleError):  # it is told, or skipped and reported, when its turn comes
                return dataset.sample(position, 0)
        return None

    def summary(self) -> str:
        """What the data hold, in one line for a person; known from `setup` on."""
        train, val = (0 if part is None else len(part) for part in (self.train_set, self.val_set))
        return f"{train} train{'s' * (train == 1)}, {val or 'none'} validate{'s' * (val == 1)}"

    def notes(self) -> str:
        """What was left out of the data, for a person; known from `setup` on."""
        return ""

    def problems(self) -> list[str]:
        """What is wrong with the data beside single samples; for the report where ``on_error`` is "skip"."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """The settings that a run that goes on should not change; where it was in its epoch is the loader's state."""
        samples = None if self.train_set is None else len(self.train_set)
        return {"settings": {**_plain_arguments(self), "training samples": samples}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Warn of the settings that have changed since a checkpoint was saved, where a fit goes on from it."""
        if self.trainer is not None and self.trainer.state.fn != TrainerFn.FITTING:
            return
        before, now = state_dict.get("settings", {}), self.state_dict()["settings"]
        changed = [name for name in now if name in before and now[name] != before[name]]
        changed += [name for name in before if name not in now]
        if changed:
            told = ", ".join(f"{name}={before[name]!r} (now {now.get(name)!r})" for name in changed)
            rank_zero_warn(
                f"{type(self).__name__}: the run that goes on was begun with other settings: {told}. What they change "
                "differs from here on; other samples or another seed change the order, and what is left of this epoch "
                "may repeat some samples and leave out others"
            )

    def teardown(self, stage: str) -> None:
        """Report the samples that were skipped, on the first rank, as a warning."""
        self._report()

    def on_exception(self, exception: BaseException) -> None:
        """A run that fails reports what it had skipped until then, and what to do where a worker died.

        The loader says so itself; but PyTorch's error comes by a signal, and so in the middle of a step as well.
        """
        whys = (explanation(exception, dataset) for dataset in self._sets())
        if why := next(filter(None, whys), ""):
            rank_zero_warn(why)
            exception.args = (why,)  # what is shown last, and kept by whoever catches it
        self._report()

    def _report(self) -> None:
        report = self.skips.report() if self.skips else ""
        if report:
            rank_zero_warn(f"{type(self).__name__}: {report}")
        self.skips = None

    def _sets(self) -> list[PixelDataset]:
        return [s for s in (self.train_set, self.val_set, self.test_set, self.predict_set) if s is not None]

    def _ranks(self) -> dict[str, int]:
        """How many share the data, and which of them this is, as samplers call it.

        The strategy knows; under tensor parallelism that is not every rank.
        """
        shared = process_ranks() if self.trainer is None else self.trainer.distributed_sampler_kwargs
        return shared or {"num_replicas": 1, "rank": 0}

    def _skips(self) -> Skips | None:
        """The report of this run; made with its first loader."""
        if self.on_error == "skip" and self.skips is None:
            # Without a trainer a folder of a new name, that nobody has made: it is made at the first skip, if at all.
            home = Path(gettempdir()) / f"latentdm-{uuid4().hex}"
            folder = (home if self.trainer is None else Path(self.trainer.default_root_dir)) / "skipped_samples"
            problems = self.problems()
            total = max(map(len, self._sets())) + len(problems)  # which count as a sample each
            ranks = self._ranks()
            self.skips = Skips(folder, ranks["rank"], ranks["num_replicas"], self.max_skipped_share, total)
            with attributed(type(self).__name__):
                for problem in problems:
                    self.skips.add(problem, problem)
        return self.skips

    def _needed(self, name: str) -> PixelDataset:
        dataset: PixelDataset | None = getattr(self, name)
        if dataset is None:
            raise UserError(f"{type(self).__name__}: {name} is None; call setup() first, and let it set {name}")
        return dataset

    def _loader(self, dataset: PixelDataset, training: bool) -> DataLoader[Sample]:
        dataset.skips = self._skips()
        dataset.owner = type(self).__name__
        dataset.read_timeout = self.read_timeout
        if self.num_workers > (dataset.reading.workers if dataset.reading else 0):
            dataset.reading = Reading(self.num_workers)
        settings: dict[str, Any] = {
            "collate_fn": dataset.collate,
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
            # Without one, each new iterator draws from the global generator, and validating changes the training.
            "generator": torch.Generator().manual_seed(sample_seed(self.seed, 0, "dataset", "workers")),
        }
        overfits = bool(getattr(self.trainer, "overfit_batches", 0))
        make = GlobalOrder if training and not overfits else InOrder
        drop_last = training and dataset.bucket_of is None
        order = make(dataset, self.batch_size, training, drop_last, seed=self.seed, **self._ranks())
        batches = RankBatches(order, self.batch_size)
        loader = PixelLoader(dataset, batch_sampler=batches, **settings)
        loader.owner = type(self).__name__
        loader.by_hand = self.trainer is None
        batches.locked = loader.by_hand and order.num_replicas > 1
        if training:
            loader.progress = Progress(self.trainer) if isinstance(self.trainer, Trainer) else None
        return loader


class PictureDataModule(PixelDataModule):
    """The base of the data modules that decode image files: what they share is checked and kept here.

    Args:
        size: side of the square images in pixels: the short side of each is resized to it, the long side cropped.
        alpha: keep transparency as a fourth channel.
        flip: mirror half of the training images, drawn for each sample and epoch.
        max_pixels: a larger image counts as broken, and is not decoded.
        random_crop: crop training images anywhere; otherwise in the centre, as all others.
        settings: of `PixelDataModule`.

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(
        self, size: int, alpha: bool, flip: bool, max_pixels: int, random_crop: bool = True, **settings: Any
    ) -> None:
        super().__init__(**settings)
        check = Check(type(self).__name__)
        self.size = check.integer("size", size, 1)
        self.alpha = alpha
        self.flip = flip
        self.max_pixels = check.integer("max_pixels", max_pixels, 1)
        self.random_crop = random_crop

    def crops(self, training: bool, target: Target | None = None) -> ResizeCrop:
        """What makes samples of records: of squares, unless there is another target."""
        random, flip = self.random_crop and training, self.flip and training
        return ResizeCrop(target or square(self.size), random, flip, self.alpha, self.seed, self.max_pixels, training)


def _plain_arguments(data: PixelDataModule) -> dict[str, Any]:
    """The arguments that a run that goes on should not change, as far as a checkpoint may hold them."""
    names = [name for name in signature(type(data).__init__).parameters if name not in FREE]
    values = {name: getattr(data, name, None) for name in names}
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
    return {name: value for name, value in plain.items() if _is_plain(value)}


def _is_plain(value: object) -> bool:
    """Whether a checkpoint may hold it."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(held) for key, held in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return isinstance(value, str | int | float | None)
