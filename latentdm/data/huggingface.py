"""Data sets of the ``datasets`` package: from the hub or a local folder, at random access or as a stream."""

import os
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from lightning.pytorch.utilities import rank_zero_info

from latentdm.batch import CAPTION, MASK, SEGMENTATION, SOURCE
from latentdm.data.budget import MAX_PIXELS
from latentdm.data.dataset import PixelDataset, Sample
from latentdm.data.decode import ImageFile
from latentdm.data.files import READ_TIMEOUT_S
from latentdm.data.geometry import COMPANIONS, Record, ResizeCrop
from latentdm.data.index import unit_hash
from latentdm.data.metadata import CAPTION_COLUMNS, RESERVED, rows_of_image
from latentdm.data.pairing import check_val_share, split_hashes
from latentdm.data.skips import SampleError
from latentdm.data.stream import Item, StreamDataModule, stable_index
from latentdm.data.watch import working
from latentdm.errors import UserError, attributed
from latentdm.extras import require
from latentdm.validation import Check

OWNER = "HuggingFaceData"

USUAL = {
    "image": ("image", "img", "jpg", "png"),
    MASK: ("mask",),
    SOURCE: ("source",),
    CAPTION: CAPTION_COLUMNS,
    SEGMENTATION: ("segmentation",),
}
"""Our name → what a column of a data set is usually called."""


@dataclass(frozen=True)
class Rows:
    """The rows of a data set.

    Attributes:
        dataset: a ``datasets.Dataset``, or in a stream a ``datasets.IterableDataset``, whose images are not decoded.
        columns: our name → the column.
        split: its name, for errors.
        folders: where images that rows name by a path must lie; None: anywhere.
    """

    dataset: Any
    columns: Mapping[str, str]
    split: str
    folders: Sequence[Path] | None = None

    @property
    def files(self) -> int:
        """The number of files of a stream."""
        return int(self.dataset.num_shards)

    def __call__(self, part: int, parts: int, turn: int, shuffle: bool) -> Iterator[Item]:
        """A part's records, of files of its own."""
        dataset = self.dataset if parts == 1 else self.dataset.shard(parts, part, contiguous=False)
        if shuffle:
            # Files alone: samples are drawn from our buffer.
            dataset = dataset.shuffle(seed=turn % 2**32, buffer_size=1)
        # Not by iterating over it: within a worker that would split it once more.
        for number, batch in enumerate(working(dataset.iter(batch_size=1))):
            row = {column: values[0] for column, values in batch.items()}
            try:
                yield self.record(row, f"{self.split}/part {part} of {parts}/{number}")
            except SampleError as error:
                yield error

    def record(self, row: Mapping[str, Any], name: str, index: int | None = None) -> Record:
        """A row as a record; without an index, its image's file gives one.

        Raises:
            SampleError: a column of pictures or captions holds something else, or a path outside the folders.
        """
        pictures: dict[str, Any] = {
            kind: _file(row[self.columns[kind]], f"the {kind} of {name}", self.folders)
            for kind in ("image", *COMPANIONS)
            if kind in self.columns
        }
        others = {column: value for column, value in row.items() if column not in self.columns.values()}
        if CAPTION in self.columns:
            others[CAPTION] = row[self.columns[CAPTION]]
        if index is None:
            index = stable_index(pictures["image"])
        return Record(name, index, **pictures, rows=rows_of_image([others], what=name))


@dataclass(eq=False)
class HuggingFaceImages(PixelDataset):
    """Some rows of a data set at random access.

    Attributes:
        table: all of them.
        rows: ``n``: those that belong here.
        crops: makes samples of them.
        first: the ``index`` of row 0.
    """

    table: Rows
    rows: npt.NDArray[np.int64]
    crops: ResizeCrop
    first: int = 0

    owner = OWNER

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.rows)

    def name(self, position: int) -> str:
        """The split and the row."""
        return f"{self.table.split}/{self.rows[position]}"

    def record(self, position: int) -> Record:
        """What is known of a row before its pictures are decoded.

        Raises:
            SampleError: a column of pictures holds something else.
        """
        row = int(self.rows[position])
        return self.table.record(self.table.dataset[row], self.name(position), self.first + row)

    def sample(self, position: int, epoch: int) -> Sample:
        """A row as `ResizeCrop` makes it.

        Raises:
            SampleError: one of its pictures cannot be read.
        """
        return self.crops(self.record(position), epoch)


class HuggingFaceData(StreamDataModule):
    """A data set of the ``datasets`` package with an image column, and perhaps masks, sources, captions and more.

    Images are treated as by `latentdm.data.ImageFolderData`, which decodes them itself: at the size needed. Columns
    that hold further images are left out, as is a column ``source`` of anything but images.

    ``index`` is the row's number; rows of ``val_split`` follow. In a stream, where rows have no number, it is a hash of
    the image's file (of 63 bits), alike in every epoch and on every worker.

    Args:
        path: a data set's id on the hub, a local folder that ``load_dataset`` reads, or what ``save_to_disk`` wrote.
        size: side of the square images in pixels.
        batch_size: images a batch, on each device.
        name: which of the data set's configurations.
        revision: of the data set on the hub.
        split: the rows to train on.
        val_split: the rows to validate on; all of ``split`` then trains. None: a share of it, in a stream none.
        val_share: share of the rows, in 0…1, that validate without a ``val_split``; a hash of its number decides.
        columns: our name → the data set's, where it is not the usual one: ``{image: photo, mask: matte, source: before,
            caption: en}``; ``mask: null`` leaves the masks out.
        streaming: read as a stream, without downloading it whole; the epoch then has a set length on every rank.
        epoch_length: training images an epoch of a stream, on all devices together.
        val_length: validation images of a stream.
        shuffle_buffer: images of a stream that are held, as files, over all parts, and drawn from.
        parts: in how many a stream is read at most; the order follows from it. Fewer with less than eight files a part.
        alpha: keep transparency as a fourth channel.
        flip: mirror half of the training images, drawn for each sample and epoch.
        random_crop: crop training images anywhere; otherwise in the centre, as all others.
        num_workers: processes that read images.
        seed: the order and the crops follow from it.
        on_error: ``"raise"`` or ``"skip"``, see `PixelDataModule`.
        max_skipped_share: the share of broken samples that ``skip`` bears.
        max_pixels: a larger image counts as broken, and is not decoded.
        read_timeout: seconds that the reading of a file may wait for its storage, see `PixelDataModule`.
        allow_outside: read images that a row names by a path outside the data set's folder and the caches of
            ``datasets``: whoever made the data set then chooses which of your files are read.

    Raises:
        ValueError: a setting is out of range; in ``prepare_data`` or ``setup``: no such data set, split or column (of a
            hub out of reach after half a minute of retries, or at once with ``HF_HUB_OFFLINE=1`` in the environment);
            while reading: a broken image.
        ImportError: in ``prepare_data`` or ``setup``: datasets is missing; the message names the extra.

    Example:
        ``HuggingFaceData("org/photos", size=512, columns={"caption": "prompt"})``
    """

    def __init__(
        self,
        path: str,
        size: int = 512,
        batch_size: int = 16,
        name: str | None = None,
        revision: str | None = None,
        split: str = "train",
        val_split: str | None = None,
        val_share: float = 0.1,
        columns: Mapping[str, str | None] | None = None,
        streaming: bool = False,
        epoch_length: int = 1024,
        val_length: int = 64,
        shuffle_buffer: int = 256,
        parts: int = 64,
        alpha: bool = False,
        flip: bool = False,
        random_crop: bool = True,
        num_workers: int = 0,
        seed: int = 0,
        on_error: str = "raise",
        max_skipped_share: float = 0.05,
        max_pixels: int = MAX_PIXELS,
        read_timeout: float = READ_TIMEOUT_S,
        allow_outside: bool = False,
    ) -> None:
        super().__init__(
            epoch_length, val_length, shuffle_buffer, parts, size=size, alpha=alpha, flip=flip, max_pixels=max_pixels,
            random_crop=random_crop, batch_size=batch_size, num_workers=num_workers, seed=seed, on_error=on_error,
            max_skipped_share=max_skipped_share, read_timeout=read_timeout,
        )  # fmt: skip
        check = Check(type(self).__name__)
        self.val_share = check_val_share(check, val_share)
        unknown = set(columns or {}) - set(USUAL)
        if unknown:
            raise UserError(
                f"{check.owner}: columns: unknown name {min(unknown)!r}; the names are {', '.join(USUAL)}, "
                "and other columns ride along under their own"
            )
        self.path = path
        self.name = name
        self.revision = revision
        self.split = split
        self.val_split = val_split
        self.columns = dict(columns or {})
        self.streaming = streaming
        self.allow_outside = allow_outside

    @attributed(OWNER)
    def prepare_data(self) -> None:
        """Download, on one process of each node; ValueError if there is no such data set or split."""
        self._load(self.split)
        if self.val_split is not None:
            self._load(self.val_split)

    @attributed(OWNER)
    def setup(self, stage: str | None = None) -> None:
        """Open the data set and set the datasets, whatever the stage.

        Raises:
            ValueError: there is no such data set or split, or a column is missing; it names those that are there.
            ImportError: datasets is missing.
        """
        table = self._open(self.split)
        held_out = None if self.val_split is None else self._open(self.val_split)
        if self.streaming:
            self.train_set = self.stream(table, training=True)
            if held_out is not None:
                self.val_set = self.test_set = self.predict_set = self.stream(held_out, training=False)
            return
        crops = self.crops(training=False)
        everything = train = np.arange(len(table.dataset))
        if held_out is not None:
            rows = np.arange(len(held_out.dataset))
            self.val_set = HuggingFaceImages(held_out, rows, crops, first=len(everything))
        else:
            train, rows = split_hashes(np.array([unit_hash(str(row)) for row in everything]), self.val_share)
            self.val_set = HuggingFaceImages(table, rows, crops) if len(rows) else None
        self.train_set = HuggingFaceImages(table, train, self.crops(training=True))
        self.test_set = self.val_set
        self.predict_set = HuggingFaceImages(table, everything, crops)

    def _load(self, split: str) -> Any:
        datasets = require("datasets", extra="huggingface", needed_by=OWNER)
        folder = Path(self.path).expanduser()
        if any((folder / file).is_file() for file in ("state.json", "dataset_dict.json")):  # by save_to_disk
            loaded = datasets.load_from_disk(str(folder))
            if isinstance(loaded, datasets.DatasetDict):
                if split not in loaded:
                    raise UserError(f"there is no split {split!r} in {folder}; it has {', '.join(loaded)}")
                loaded = loaded[split]
            return loaded.to_iterable_dataset() if self.streaming else loaded
        path = str(folder) if folder.is_dir() else self.path
        try:
            return datasets.load_dataset(path, self.name, split=split, revision=self.revision, streaming=self.streaming)
        except (OSError, ValueError) as error:
            message = " ".join(str(error).split()).rstrip(".")
            why = f"cannot load split {split!r} of path={self.path!r}: {message}"
            if isinstance(error, ConnectionError | FileNotFoundError) and not folder.is_dir():
                why += (
                    "; there is no such folder here, and the hub gave nothing: out of reach and not in its cache, a "
                    "data set that wants a login (hf auth login), or a wrong id. Without a network HF_HUB_OFFLINE=1 in "
                    "the environment asks the cache alone, without retries"
                )
            raise UserError(why) from error

    def _open(self, split: str) -> Rows:
        """The rows of a split, with their images as files."""
        datasets = require("datasets", extra="huggingface", needed_by=OWNER)
        dataset = self._load(split)
        names = list(dataset.column_names or next(iter(dataset)))
        pictures = [name for name, kind in (dataset.features or {}).items() if isinstance(kind, datasets.Image)]
        columns: dict[str, str] = {}
        for ours, usual in USUAL.items():
            # Often such a column says where a row is from, or holds polygons.
            usable = pictures if ours in (SOURCE, SEGMENTATION) else names
            theirs = self.columns[ours] if ours in self.columns else next((n for n in usual if n in usable), None)
            if theirs is None and ours != "image":
                continue
            if theirs is None or theirs not in names:
                raise UserError(
                    f"no column {theirs or ours!r} for {ours} in {self.path}; it has {', '.join(names)}: say which "
                    f"with columns={{{ours}: …}}"
                )
            columns[ours] = theirs
        for column in pictures:
            if column in columns.values():
                dataset = dataset.cast_column(column, datasets.Image(decode=False))
            else:
                dataset = dataset.remove_columns(column)
        if reserved := sorted(RESERVED.intersection(names).difference(columns.values(), pictures)):
            rank_zero_info(f"{OWNER}: columns {', '.join(reserved)} are left out: a batch has them itself; rename them")
            dataset = dataset.remove_columns(reserved)
        return Rows(dataset, columns, split, None if self.allow_outside else self._folders())

    def _folders(self) -> list[Path]:
        """Where the files of a data set lie: in its folder, or in the caches of what was downloaded and unpacked."""
        datasets = require("datasets", extra="huggingface", needed_by=OWNER)
        hub = require("huggingface_hub.constants", extra="huggingface", needed_by=OWNER)
        config = datasets.config
        caches = [hub.HF_HUB_CACHE, config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH]
        local = Path(self.path).expanduser()
        folders = [*map(Path, caches), config.EXTRACTED_DATASETS_PATH, *([local] if local.is_dir() else [])]
        return [path for folder in folders for path in (Path(os.path.abspath(folder)), Path(folder).resolve())]


def _file(value: Any, what: str, folders: Sequence[Path] | None) -> ImageFile:
    """The file that an image column holds: its content, or its path, which must lie in one of the folders, if any."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise SampleError(f"cannot read {what}: it is {reprlib.repr(value)} and no file; remove the row")
    path = Path(value)
    # Links count by where they lie: a hub's cache is made of them.
    if folders is not None and not any(Path(os.path.abspath(path)).is_relative_to(folder) for folder in folders):
        raise SampleError(
            f"cannot read {what}: its path {value} lies outside the data set; remove the row, or set "
            "allow_outside=true if you trust the data set with all files that you may read"
        )
    return path
