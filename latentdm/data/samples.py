"""Random crops of the photographs inside scikit-image: training data that needs no download."""

from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from typing import Literal

import torch
from PIL import Image

from latentdm.data.dataset import PixelDataset, Sample
from latentdm.data.decode import RESAMPLE, image_to_tensor
from latentdm.data.geometry import Crop, Record, size_columns
from latentdm.data.module import PixelDataModule
from latentdm.data.photographs import photographs
from latentdm.draws import sample_generator
from latentdm.validation import Check


@dataclass(frozen=True)
class PhotographCrop:
    """Makes a crop of a photograph.

    It is a square with a side between ``size`` and ``2·size`` pixels (or less, where the photograph is smaller),
    resized to ``size`` and mirrored half of the time.

    Attributes:
        split: ``"train"`` draws each crop anew every epoch, ``"val"`` draws it once.
        size: side of the square images in pixels.
        first_index: the ``index`` of the first crop.
        seed: the crops follow from it.
        count: crops an epoch.
    """

    split: Literal["train", "val"]
    size: int
    first_index: int
    seed: int
    count: int

    @property
    def an_epoch(self) -> int:
        """Crops of each photograph in an epoch; of some there is one more."""
        return max(self.count // len(photographs(self.split)), 1)

    def again(self, record: Record) -> tuple[int, int]:
        """How many crops of the photograph an epoch has before this one; and the index of the first of them."""
        number, photograph = divmod(record.index - self.first_index, len(photographs(self.split)))
        return number, self.first_index + photograph

    def __call__(self, record: Record, epoch: int) -> Sample:
        """``pixels`` uint8 ``3 size size``, ``index``, ``name``, and its `size_columns`."""
        photograph = photographs(self.split)[record.name]
        height, width = photograph.shape[:2]
        # Not from the index: the validation crops stay when epoch_length, and with it their index, changes.
        key = f"{self.split}/{record.index - self.first_index}"
        generator = sample_generator(self.seed, epoch if self.split == "train" else 0, key, "crop")
        short = min(height, width)
        side = _integer(min(self.size, short), min(2 * self.size, short), generator)
        top, left = (_integer(0, room - side, generator) for room in (height, width))
        crop = Image.fromarray(photograph[top : top + side, left : left + side])
        pixels = image_to_tensor(crop.resize((self.size, self.size), RESAMPLE))
        mirrored = bool(_integer(0, 1, generator))
        if mirrored:
            pixels = pixels.flip(-1)
        full_width, full_height, left, top = (round(pixel * self.size / side) for pixel in (width, height, left, top))
        sizes = size_columns(Crop(full_width, full_height, left, top, self.size, self.size, mirrored), width, height)
        return {"pixels": pixels, "index": record.index, "name": record.name, **sizes}


@dataclass(eq=False)
class PhotographCrops(PixelDataset):
    """Crops of the sample photographs, which take turns.

    Attributes:
        crops: makes them.
        split: of which part of each photograph.
        first_index: the ``index`` of the first crop.
        count: crops an epoch.
    """

    crops: PhotographCrop
    split: Literal["train", "val"]
    first_index: int
    count: int

    def __len__(self) -> int:
        """Crops an epoch."""
        return self.count

    def record(self, position: int) -> Record:
        """The photograph of crop number ``position``."""
        names = list(photographs(self.split))
        name = names[position % len(names)]
        return Record(name, self.first_index + position, photograph_hash(self.split, name))

    def sample(self, position: int, epoch: int) -> Sample:
        """Crop number ``position``, as `PhotographCrop` makes it."""
        return self.crops(self.record(position), epoch)


class SamplesData(PixelDataModule):
    """Crops of the photographs inside scikit-image.

    Training sees the left two thirds of each photograph, validation the right third. Training crops are drawn anew
    each epoch and have ``index`` 0…epoch_length − 1; validation crops are fixed and their ``index`` goes on from there.
    Testing and predicting take the validation crops.

    Args:
        size: side of the square images in pixels.
        batch_size: images a batch, on each device.
        epoch_length: training images an epoch, on all devices together.
        val_length: validation images; 0: no validation.
        num_workers: processes that read images.
        seed: the order and the crops follow from it.

    Raises:
        ValueError: a setting is out of range.
        ImportError: in ``setup``: scikit-image is missing; the message names the extra.

    Example:
        >>> data = SamplesData(size=64, batch_size=4)
        >>> data.setup()
        >>> next(iter(data.train_dataloader()))["pixels"].shape
        torch.Size([4, 3, 64, 64])
    """

    def __init__(
        self,
        size: int = 128,
        batch_size: int = 16,
        epoch_length: int = 1024,
        val_length: int = 64,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        check = Check(type(self).__name__)
        self.size = check.integer("size", size, 1)
        self.epoch_length = check.integer("epoch_length", epoch_length, 1)
        self.val_length = check.integer("val_length", val_length, 0)

    def setup(self, stage: str | None = None) -> None:
        """Load the photographs (once a process; workers inherit them) and set the datasets, whatever the stage."""
        photographs("train")
        self.train_set = self._crops("train", self.epoch_length)
        if self.val_length:
            self.val_set = self._crops("val", self.val_length)
            self.test_set = self.predict_set = self.val_set

    def _crops(self, split: Literal["train", "val"], count: int) -> PhotographCrops:
        first = 0 if split == "train" else self.epoch_length
        return PhotographCrops(PhotographCrop(split, self.size, first, self.seed, count), split, first, count)


@cache
def photograph_hash(split: Literal["train", "val"], name: str) -> bytes:
    """What tells this part of a photograph from any other picture: 16 bytes."""
    photograph = photographs(split)[name]
    return blake2b(repr(photograph.shape).encode() + photograph.tobytes(), digest_size=16).digest()


def _integer(low: int, high: int, generator: torch.Generator) -> int:
    """A uniform integer in low…high, both included."""
    return int(torch.randint(low, high + 1, (), generator=generator))
