"""A folder of images, with masks and captions beside them or without.

Shapes: ``c h w``; ``H W`` is an image as it lies in its file.
"""

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from lightning.pytorch.utilities import rank_zero_info

from latentdm.data.base import Joined, PixelDataModule, PixelDataset, Sample, check_at_least, check_share
from latentdm.data.bucket_crops import BucketCrops
from latentdm.data.buckets import BucketPlan, Buckets
from latentdm.data.files import Pairing, find_images, split_hashes
from latentdm.data.images import MAX_PIXELS
from latentdm.data.index import FolderIndex, folder_index
from latentdm.data.metadata import CAPTION, read_sidecar
from latentdm.data.skips import SampleError
from latentdm.data.squares import Record, Squares
from latentdm.errors import UserError

CHOICES = ("auto", "require", "ignore")

KEPT_FROM = 10_000
"""Images from which an index is kept: a smaller folder is listed anew each time, in less than a second."""


class FolderImages(PixelDataset):
    """Some of the images of a folder.

    Args:
        index: all of them.
        rows: ``n``: those that belong here.
        squares: makes samples of them.
        first: the ``index`` of the first image in ``index``.
        masks: every image must have a mask.
        captions: every sample has a ``caption``, an empty one if need be.
        captions_required: an empty one will not do.
    """

    def __init__(
        self,
        index: FolderIndex,
        rows: npt.NDArray[np.int64],
        squares: Squares,
        first: int = 0,
        masks: bool = False,
        captions: bool = False,
        captions_required: bool = False,
    ) -> None:
        self.index = index
        self.rows = rows
        self.squares = squares
        self.first = first
        self.masks = masks
        self.captions = captions
        self.captions_required = captions_required

    def __len__(self) -> int:
        """The number of images."""
        return len(self.rows)

    def name(self, place: int) -> str:
        """The image's path inside the folder."""
        return self.index[int(self.rows[place])].name

    def record(self, place: int) -> Record:
        """What is known of an image before it is decoded.

        Raises:
            SampleError: it lacks a mask or a caption, or the latter cannot be read.
        """
        row = int(self.rows[place])
        entry = self.index[row]
        root, owner = self.index.root, self.squares.owner
        columns: dict[str, Any] = dict(entry.columns or {})
        if entry.caption is not None:
            columns = {**read_sidecar(root / entry.caption, owner), **columns}
        if self.captions_required and not columns.get(CAPTION):
            raise SampleError(
                f"{owner}: an image without a caption: {root / entry.name}; add one, or set captions=auto"
            )
        if self.captions and columns.get(CAPTION) is None:
            columns[CAPTION] = ""
        if self.masks and entry.mask is None:
            raise SampleError(f"{owner}: an image without a mask: {root / entry.name}; add one, or set masks=ignore")
        mask = None if entry.mask is None else root / entry.mask
        return Record(entry.name, self.first + row, root / entry.name, mask, columns)

    def sample(self, place: int, epoch: int) -> Sample:
        """An image, its mask and its columns, as `Squares` makes them.

        Raises:
            SampleError: a file cannot be read, or is missing.
        """
        return self.squares(self.record(place), epoch)


class ImageFolderData(PixelDataModule):
    """The images of a folder and of the folders inside it, as squares of one size.

    The short side of each image is resized to ``size`` (Lanczos) and the long side cropped: at a place drawn for each
    sample and epoch in training, in the centre otherwise. EXIF orientation is applied, ICC profiles are converted to
    sRGB; gray, palette, CMYK and 16-bit images become 8-bit RGB, of an animation the first frame is taken. Testing
    takes the validation images, predicting all images, each in order.

    The mask of ``a/b.jpg`` is ``a/b-mask.png`` or ``masks/a/b.png`` (any image ending), or the file that a metadata
    column ``mask`` or ``mask_file_name`` names; white means repaint. All images have a mask or none has. A mask may
    have another size than its image, but not another shape. It is resized to it and then along with it, both times
    bilinearly without antialias, as the encoders do; gray levels stay, because rounding comes later.

    ``caption`` comes from ``a/b.txt``, from ``a/b.json`` (a text, or an object with ``caption`` or ``text``) or from a
    ``metadata.jsonl`` or ``metadata.csv`` in any folder, whose ``file_name`` is relative to that folder. Where some
    images have one, the others get an empty one. All other columns ride along under their own names.

    ``index`` is an image's place among all images of ``root``, sorted by name; those of ``val_root`` follow.

    With ``buckets`` images keep their aspect ratio, as nearly as a bucket has it, and each batch is of one bucket. A
    table of the images of each bucket is printed in ``setup``. Batches then hold ``original_size``, ``crop_top_left``
    (in the resized image) and ``target_size`` as well: int64 ``b 2``, rows first, for SDXL's micro-conditioning.

    Args:
        root: the folder.
        size: side of the square images in pixels; without effect where there are ``buckets``.
        batch_size: images a batch, on each device.
        val_share: share of the images that validate, in 0…1; 0: no validation. A hash of its name decides for each
            image, so that it stays on its side when images are added. Without effect where ``val_root`` is given.
        val_root: a folder of validation images; all of ``root`` then trains, apart from ``val_root`` inside it.
        masks: ``"auto"`` takes the masks where there are some, ``"require"`` insists on them, ``"ignore"`` leaves them.
        captions: the same for captions.
        columns: our name → that of a metadata column, where it is called otherwise: ``{caption: prompt}``.
        alpha: keep transparency as a fourth channel of ``pixels`` (255 = opaque), for a mask source to read. It is
            resized like a mask.
        flip: mirror half of the training images, drawn for each sample and epoch.
        random_crop: crop training images anywhere; otherwise in the centre, as all others.
        buckets: settings of `latentdm.data.buckets.Buckets`: ``{area: 1048576, step: 64}``; None: squares.
        num_workers: processes that read images.
        seed: the order and the crops follow from it.
        on_error: ``"raise"`` or ``"skip"``, see `PixelDataModule`.
        max_skipped_share: the share of broken samples that ``skip`` bears.
        max_pixels: a larger image counts as broken, and is not decoded.
        index_dir: where the list of a folder of more than ten thousand images is kept, so that it is listed once:
            None: ``~/.cache/latentdm``, or where ``XDG_CACHE_HOME`` says. Nothing is written into ``root``. The list is
            made anew when a folder or a metadata file in it has changed.

    Raises:
        ValueError: a setting is out of range or a folder is missing; in ``setup``: no images, or masks or metadata that
            do not match them; while reading: a broken file.

    Example:
        ``ImageFolderData("photos", size=512, batch_size=8)`` gives batches of ``pixels`` uint8 ``8 3 512 512``,
        ``index``, ``name`` and, with masks beside the images, ``mask`` uint8 ``8 1 512 512``.
    """

    def __init__(
        self,
        root: str | Path,
        size: int = 512,
        batch_size: int = 16,
        val_share: float = 0.1,
        val_root: str | Path | None = None,
        masks: str = "auto",
        captions: str = "auto",
        columns: Mapping[str, str] | None = None,
        alpha: bool = False,
        flip: bool = False,
        num_workers: int = 0,
        seed: int = 0,
        on_error: str = "raise",
        max_skipped_share: float = 0.05,
        max_pixels: int = MAX_PIXELS,
        index_dir: str | Path | None = None,
        random_crop: bool = True,
        buckets: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, on_error, max_skipped_share)
        check_at_least(1, "ImageFolderData", size=size, max_pixels=max_pixels)
        check_share("ImageFolderData", val_share)
        for setting, value in (("masks", masks), ("captions", captions)):
            if value not in CHOICES:
                raise UserError(f"ImageFolderData: {setting} must be one of {', '.join(CHOICES)}, got {value!r}")
        self.root = _folder("root", root)
        self.size = size
        self.val_share = val_share
        self.val_root = None if val_root is None else _folder("val_root", val_root)
        self.masks = masks
        self.captions = captions
        self.columns = dict(columns or {})
        self.alpha = alpha
        self.flip = flip
        self.random_crop = random_crop
        self.buckets = None if buckets is None else Buckets(**buckets)
        self._plan: BucketPlan | None = None
        self._sizes: dict[Path, npt.NDArray[np.int32]] = {}
        self.max_pixels = max_pixels
        self.index_dir = default_index_dir() if index_dir is None else Path(index_dir).expanduser()

    def setup(self, stage: str | None = None) -> None:
        """List the files and set the datasets, whatever the stage.

        Raises:
            ValueError: no images, or masks or metadata that do not match them; it names the file.
        """
        index = self._index(self.root, skip=self.val_root)
        everything = np.arange(len(index))
        if self.buckets is not None:
            self._plan = self.buckets.plan(self._image_sizes(index))
            rank_zero_info(self._plan.table("ImageFolderData"))
        if self.val_root is None:
            train, val = split_hashes(index.hashes, self.val_share)
            self.val_set = self._dataset(index, val, training=False) if len(val) else None
        else:
            train = everything
            held_out = self._index(self.val_root)
            self.val_set = self._dataset(held_out, np.arange(len(held_out)), training=False, first=len(index))
        self.train_set = self._dataset(index, train, training=True)
        self.test_set = self.val_set
        predict = self._dataset(index, everything, training=False)
        self.predict_set = predict if self.val_root is None or not self.val_set else Joined(predict, self.val_set)

    def problems(self) -> list[str]:
        """What is wrong with the folder, beside single images; known from `setup` on, where ``on_error`` is "skip"."""
        indices = {id(s.index): s.index for s in (self.train_set, self.val_set) if isinstance(s, FolderImages)}
        return [problem for index in indices.values() for problem in index.problems]

    def _index(self, root: Path, skip: Path | None = None) -> FolderIndex:
        pairing = Pairing(self.masks, self.captions, self.columns, lenient=self.on_error == "skip")
        settings = {**asdict(pairing), "skip": skip and skip.resolve()}  # a relative one means another folder elsewhere
        build = lambda: find_images(root, "ImageFolderData", pairing, skip)  # noqa: E731
        return folder_index(root, settings, build, self.index_dir, KEPT_FROM)

    def _dataset(self, index: FolderIndex, rows: npt.NDArray[np.int64], training: bool, first: int = 0) -> FolderImages:
        settings: dict[str, Any] = {
            "owner": "ImageFolderData",
            "random_crop": self.random_crop and training,
            "flip": self.flip and training,
            "alpha": self.alpha,
            "seed": self.seed,
            "max_pixels": self.max_pixels,
        }
        plan = self._plan
        squares = Squares(size=self.size, **settings) if plan is None else BucketCrops(plan, **settings)
        required = self.captions == "require"
        captions = required or (self.captions == "auto" and index.captioned)
        masks = self.masks == "require" or index.masked
        images = FolderImages(index, rows, squares, first, masks, captions, required)
        images.bucket_of = None if plan is None else plan.places(self._image_sizes(index)[rows])
        return images

    def _image_sizes(self, index: FolderIndex) -> npt.NDArray[np.int32]:
        """``n 2``, read once. A file that cannot be read counts as a square, and is replaced by one if at all."""
        if index.root not in self._sizes:
            self._sizes[index.root] = np.maximum(index.image_sizes("ImageFolderData"), 1)
        return self._sizes[index.root]


def default_index_dir() -> Path:
    """Where a user's caches lie."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "latentdm" / "folders"


def _folder(setting: str, value: str | Path) -> Path:
    path = Path(value).expanduser()
    if not path.is_dir():
        what = "is a file" if path.is_file() else "does not exist"
        raise UserError(
            f"ImageFolderData: {setting}={str(value)!r} {what}; give a folder of images (searched from {Path.cwd()})"
        )
    return path
