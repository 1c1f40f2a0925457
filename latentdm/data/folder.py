"""A folder of images, with masks, sources and captions beside them or without."""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from lightning.pytorch.utilities import rank_zero_info

from latentdm.batch import CAPTION, MASK, SEGMENTATION, SOURCE
from latentdm.data.buckets import BucketPlan, Buckets, Size
from latentdm.data.budget import MAX_PIXELS
from latentdm.data.dataset import Joined, PixelDataset, Sample
from latentdm.data.described import stored
from latentdm.data.files import READ_TIMEOUT_S, Patience, patient
from latentdm.data.geometry import COMPANIONS, Record, ResizeCrop
from latentdm.data.index import FolderIndex, Found, folder_index
from latentdm.data.listing import existing_folder, name_inside
from latentdm.data.metadata import read_sidecar, rows_of_image
from latentdm.data.module import PictureDataModule
from latentdm.data.pairing import check_val_share, find_images, split_hashes
from latentdm.data.siblings import beside
from latentdm.data.skips import SampleError
from latentdm.errors import UserError, attributed
from latentdm.validation import Check

OWNER = "ImageFolderData"

CHOICES = ("auto", "require", "ignore")

KEPT_FROM = 10_000
"""Images from which an index is kept: a smaller folder is listed anew each time, in less than a second."""


@dataclass(eq=False)
class FolderImages(PixelDataset):
    """Some of the images of a folder.

    Attributes:
        index: all of them.
        rows: ``n``: those that belong here.
        crops: makes samples of them.
        first: the ``index`` of the first one, from which they are counted; None: it is the row.
        inside: the folder among them that their names are relative to.
        required: what every image must have: any of ``mask``, ``source``, ``segmentation`` and ``caption``.
        captions: every sample has a ``caption``, an empty one if need be.
        renames: our name of a column → its name in JSON files beside images.
        shapes: the sizes of the buckets, which hold even where an image was replaced by one of another shape.
    """

    index: FolderIndex
    rows: npt.NDArray[np.int64]
    crops: ResizeCrop
    first: int | None = None
    inside: str = ""
    required: Collection[str] = ()
    captions: bool = False
    renames: Mapping[str, str] = field(default_factory=dict)
    shapes: Sequence[Size] = ()

    owner = OWNER

    def __len__(self) -> int:
        """The number of images."""
        return len(self.rows)

    def name(self, position: int) -> str:
        """The image's path inside the folder."""
        return self.index.name(int(self.rows[position])).removeprefix(self.inside)

    def record(self, position: int) -> Record:
        """What is known of an image before it is decoded.

        Raises:
            SampleError: it lacks a mask, a source or a caption, or what is written about it cannot be read.
        """
        row, root = int(self.rows[position]), self.index.root
        entry = self.index[row]
        described, further = stored(entry.columns)
        files = [*([] if entry.caption is None else [entry.caption]), *further]
        texts = [read_sidecar(root / file, file, self.renames) for file in files]
        rows = rows_of_image(described, texts)
        if CAPTION in self.required and not rows[0].get(CAPTION):
            raise SampleError(f"an image without a caption: {root / entry.name}; add one, or set captions=auto")
        if self.captions and rows[0].get(CAPTION) is None:
            rows[0][CAPTION] = ""
        pictures: dict[str, Any] = {}
        for kind in COMPANIONS:
            name = getattr(entry, kind)
            if name is None and kind in self.required:
                raise SampleError(f"an image without a {kind}: {root / entry.name}; add one, or set {kind}s=ignore")
            pictures[kind] = None if name is None else beside(root, self.index.folders.get(kind)) / name
        target = None if self.bucket_of is None else self.shapes[self.bucket_of[position]]
        image = root / entry.name
        name, number = entry.name.removeprefix(self.inside), row if self.first is None else self.first + position
        return Record(name, number, image, **pictures, target=target, rows=rows)

    def sample(self, position: int, epoch: int) -> Sample:
        """An image, its companions and its columns, as `ResizeCrop` makes them.

        Raises:
            SampleError: a file cannot be read, or does not exist.
        """
        return self.crops(self.record(position), epoch)


class ImageFolderData(PictureDataModule):
    """The images of a folder and of the folders inside it, as squares of one size.

    The short side of each image is resized to ``size`` (Lanczos) and the long side cropped: anywhere in training, drawn
    for each sample and epoch, in the centre otherwise. EXIF orientation is applied, ICC profiles are converted to sRGB;
    gray, palette, CMYK and 16-bit images become 8-bit RGB, of an animation the first frame is taken. Testing takes the
    validation images, predicting all images, each in order.

    The mask of ``a/b.jpg`` is ``a/b-mask.png`` or ``masks/a/b.png`` (any image ending), another of the usual names in
    ``docs/data.md``, as a ``masks/`` folder beside ``root``, or the file that a metadata column ``mask`` or
    ``mask_file_name`` names; white means repaint. All images have a mask or none has. A mask may have another size than
    its image, but not another shape. It is resized to it and then along with it, both times bilinearly without
    antialias, as the encoders do; gray levels stay, because rounding comes later. ``setup`` says in a line what was
    found, and in another what was left out.

    The source of ``a/b.jpg`` is the picture that the model is shown where the image itself is the target: the one
    before a removal or an edit. It is ``a/b-source.png`` or ``sources/a/b.png``, or the file that a metadata column
    ``source`` or ``source_file_name`` names; the rules are those of masks. It is treated as its image is.

    The label map of ``a/b.jpg``, for ``masks=segmentation``, is ``a/b-segmentation.png`` or ``segmentations/a/b.png``,
    or the file that a metadata column ``segmentation`` names; the rules are those of masks, but for that its numbers
    stay what they are: those of a palette count, not its colours.

    ``caption`` comes from ``a/b.txt`` or ``a/b.caption``, from ``a/b.json`` (a text, or an object with ``caption`` or
    ``text``) or from a ``metadata.jsonl``, ``.csv`` or ``.parquet`` in any folder, whose ``file_name`` is relative to
    that folder. Of several captions of an image (a list, several rows or files) training draws one for each sample and
    epoch, with the columns of its row; otherwise the first is taken. Where some images have one, the others get an
    empty one. All other columns ride along under their own names, but for those that a batch needs (``name``,
    ``latents``, …), which are left out with a word.

    ``index`` is an image's number among all images of ``root``, sorted by name; those of ``val_root`` follow.

    With ``buckets`` images keep their aspect ratio, as nearly as a bucket has it, and each batch is of one bucket. A
    table of the images of each bucket is printed in ``setup``.

    Args:
        root: the folder.
        size: side of the square images in pixels; without effect with ``buckets``.
        batch_size: images a batch, on each device.
        val_share: share of the images that validate, in 0…1; 0: no validation. A hash of its name decides for each
            image, so that it stays on its side when images are added. Without effect where ``val_root`` is given.
        val_root: a folder of validation images; all of ``root`` then trains, apart from ``val_root`` inside it, for
            which metadata and masks further up count too.
        masks: ``"auto"`` takes the masks if there are any, ``"require"`` insists on them, ``"ignore"`` leaves them out.
        sources: the same for sources.
        segmentations: the same for label maps.
        read_timeout: seconds that the reading of a file may wait for its storage, see `PixelDataModule`.
        captions: the same for captions.
        columns: our name → that of a metadata column with another name: ``{caption: prompt}``; ``image`` is the one
            that names the image.
        alpha: keep transparency as a fourth channel of ``pixels`` (255 = opaque), for a mask source to read. It is
            resized like a mask.
        flip: mirror half of the training images, drawn for each sample and epoch.
        random_crop: crop training images anywhere; otherwise in the centre, as all others.
        buckets: settings of `latentdm.data.Buckets`: ``{area: 1048576, step: 64}``; None: squares.
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
        sources: str = "auto",
        segmentations: str = "auto",
        read_timeout: float = READ_TIMEOUT_S,
    ) -> None:
        super().__init__(
            size=size, alpha=alpha, flip=flip, max_pixels=max_pixels, random_crop=random_crop, batch_size=batch_size,
            num_workers=num_workers, seed=seed, on_error=on_error, max_skipped_share=max_skipped_share,
            read_timeout=read_timeout,
        )  # fmt: skip
        check = Check(type(self).__name__)
        self.val_share = check_val_share(check, val_share)
        self.masks = check.choice("masks", masks, CHOICES)
        self.sources = check.choice("sources", sources, CHOICES)
        self.segmentations = check.choice("segmentations", segmentations, CHOICES)
        self.captions = check.choice("captions", captions, CHOICES)
        with attributed(check.owner), patient(Patience(self.read_timeout)):
            self.root = existing_folder("root", root, "images")
            self.val_root = None if val_root is None else existing_folder("val_root", val_root, "images")
        self.columns = dict(columns or {})
        self.buckets = None if buckets is None else Buckets(**buckets)
        self._plan: BucketPlan | None = None
        self._indices: dict[Path, FolderIndex] = {}
        self.index_dir = None if index_dir is None else Path(index_dir).expanduser()

    @attributed(OWNER)
    def setup(self, stage: str | None = None) -> None:
        """List the files and set the datasets, whatever the stage.

        Raises:
            ValueError: no images, or masks, sources or metadata that do not match them; it names the file.
        """
        with patient(Patience(self.read_timeout)):
            self._set_up()

    def _set_up(self) -> None:
        index = of_val = self._index(self.root, self.val_root)
        everything = train = np.arange(len(index))
        inside = ""
        if self.val_root is None:
            train, val = split_hashes(index.hashes, self.val_share)
        elif name := name_inside(self.root, self.val_root):  # listed together, as what is written above is of both
            inside = f"{name}/"
            held_out = index.below(inside)
            val = np.flatnonzero(held_out)
            everything = train = np.flatnonzero(~held_out)
            for setting, found in (("root", train), ("val_root", val)):
                if not len(found):
                    raise UserError(f"no images in {setting}={str(getattr(self, setting))!r}, apart from the other's")
        elif name_inside(self.val_root, self.root):
            raise UserError(
                f"root={str(self.root)!r} lies in val_root={str(self.val_root)!r}, whose images would train as well; "
                "give a folder for validation inside root, or one beside it"
            )
        else:
            of_val = self._index(self.val_root)
            val = np.arange(len(of_val))
        if self.buckets is not None:
            self._plan = self.buckets.plan(index.sizes[everything])
            rank_zero_info(f"{OWNER}: {self._plan.table()}")
        self.train_set = self._dataset(index, train, training=True, first=0 if self.val_root else None)
        self.predict_set = predict = self._dataset(index, everything, training=False, first=0)
        self.val_set = self.test_set = None
        if len(val):
            first = len(train) if self.val_root else None
            self.val_set = self.test_set = self._dataset(of_val, val, False, first, inside)
            if self.val_root:
                self.predict_set = Joined(predict, self.val_set)
        rank_zero_info(f"{OWNER}: {self.summary()}")
        if notes := self.notes():
            rank_zero_info(f"{OWNER}: {notes}")

    def summary(self) -> str:
        """How many images, masks, sources and captions there are, how they are split, and whether masks are used."""
        indices = self._indices.values()
        counts = {"image": sum(map(len, indices)), **{k: sum(i.count(k) for i in indices) for k in COMPANIONS}}
        counts[CAPTION] = sum(index.captioned for index in indices)
        counts = {what: count for what, count in counts.items() if count or what not in (SOURCE, SEGMENTATION)}
        parts = ", ".join(f"{count or 'no'} {what}{'s' * (count != 1)}" for what, count in counts.items())
        unused = self.masks_unused if counts[MASK] else ""
        return f"{parts}; {super().summary()}" + (f"; masks are not used: {unused}" if unused else "")

    def notes(self) -> str:
        """What was left out, by endings with an example, and what else a person should know; known from `setup` on."""
        return "; ".join(note for index in self._indices.values() for note in index.notes)

    def problems(self) -> list[str]:
        """What is wrong with the folder, beside single images; known from `setup` on, where ``on_error`` is "skip"."""
        return [problem for index in self._indices.values() for problem in index.problems]

    @property
    def _choices(self) -> dict[str, str]:
        return {MASK: self.masks, SOURCE: self.sources, SEGMENTATION: self.segmentations, CAPTION: self.captions}

    def _index(self, root: Path, held_out: Path | None = None) -> FolderIndex:
        choices, lenient = self._choices, self.on_error == "skip"
        settings: dict[str, Any] = {f"{kind}s": choice for kind, choice in choices.items()}
        settings |= {"columns": self.columns, "lenient": lenient}
        settings["skip"] = held_out and held_out.resolve()  # elsewhere a relative one is another

        def build() -> Found:
            return find_images(root, choices, self.columns, lenient, held_out)

        index = folder_index(root, settings, build, self.index_dir or default_index_dir(), KEPT_FROM)
        if not index.is_same(self._indices.get(root)):  # of one that is, the sizes may have been read
            self._indices[root] = index
        return self._indices[root]

    def _dataset(
        self,
        index: FolderIndex,
        rows: npt.NDArray[np.int64],
        training: bool,
        first: int | None = None,
        inside: str = "",
    ) -> FolderImages:
        required = {name for name, choice in self._choices.items() if choice == "require"}
        required |= {kind for kind in COMPANIONS if index.count(kind)}
        captions = self.captions == "require" or (self.captions == "auto" and index.captioned > 0)
        plan = self._plan
        crops = self.crops(training, None if plan is None else plan.shape)
        images = FolderImages(index, rows, crops, first, inside, required, captions, self.columns)
        if plan is not None:
            images.bucket_of = plan.buckets(index.sizes[rows])
            images.shapes = plan.shapes
        return images


def default_index_dir() -> Path:
    """The folder of a user's caches."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "latentdm" / "folders"
