"""Data sets of the ``datasets`` package: from the hub or a local folder, at random access or as a stream."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from latentdm.data.base import PixelDataModule, PixelDataset, Sample, check_at_least, check_share
from latentdm.data.files import split_hashes
from latentdm.data.images import MAX_PIXELS, Source
from latentdm.data.index import unit_hash
from latentdm.data.metadata import CAPTION, CAPTION_COLUMNS
from latentdm.data.skips import SampleError
from latentdm.data.squares import Record, Squares
from latentdm.data.stream import Item, StreamImages, stable_index
from latentdm.errors import UserError
from latentdm.extras import require

OWNER = "HuggingFaceData"

USUAL = {"image": ("image", "img", "jpg", "png"), "mask": ("mask",), CAPTION: CAPTION_COLUMNS}
"""Our name → what a column of a data set is usually called."""


class HuggingFaceImages(PixelDataset):
    """Some rows of a data set.

    Args:
        dataset: a ``datasets.Dataset`` whose images are not decoded.
        rows: ``n``: those that belong here.
        columns: our name → the column.
        squares: makes samples of them.
        first: the ``index`` of row 0.
        split: its name, for errors.
    """

    def __init__(
        self,
        dataset: Any,
        rows: npt.NDArray[np.int64],
        columns: Mapping[str, str],
        squares: Squares,
        first: int,
        split: str,
    ) -> None:
        self.dataset = dataset
        self.rows = rows
        self.columns = dict(columns)
        self.squares = squares
        self.first = first
        self.split = split

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.rows)

    def name(self, place: int) -> str:
        """The split and the row."""
        return f"{self.split}/{self.rows[place]}"

    def sample(self, place: int, epoch: int) -> Sample:
        """A row as `Squares` makes it.

        Raises:
            SampleError: its image or its mask cannot be read.
        """
        row = int(self.rows[place])
        record = _record(self.dataset[row], self.columns, self.name(place), self.first + row)
        return self.squares(record, epoch)


class HuggingFaceStream(StreamImages):
    """The images of a streamed data set.

    Args:
        dataset: a ``datasets.IterableDataset`` whose images are not decoded.
        columns: our name → the column.
        squares: makes samples of them.
        length: samples an epoch.
        training: shuffle.
        shuffle_buffer: records to draw from.
        seed: the order follows from it.
        split: its name, for errors.
    """

    def __init__(
        self,
        dataset: Any,
        columns: Mapping[str, str],
        squares: Squares,
        length: int,
        training: bool,
        shuffle_buffer: int,
        seed: int,
        split: str,
    ) -> None:
        super().__init__(squares, length, training, shuffle_buffer, seed)
        self.dataset = dataset
        self.columns = dict(columns)
        self.split = split

    def items(self, part: int, parts: int, turn: int) -> Iterator[Item]:
        """This part's records: whole files of the data set where they divide by the parts, else every n-th sample."""
        distributed = require("datasets.distributed", extra="huggingface", needed_by=OWNER)
        dataset = self.dataset
        if self.training:
            # The order of the files; samples are drawn from our own buffer, after the split.
            dataset = dataset.shuffle(seed=turn % 2**32, buffer_size=1)
        if parts > 1:
            dataset = distributed.split_dataset_by_node(dataset, rank=part, world_size=parts)
        # Not by iterating over it: within a worker that would split it once more.
        for number, batch in enumerate(dataset.iter(batch_size=1)):
            row = {column: values[0] for column, values in batch.items()}
            try:
                name = f"{self.split}/part {part} of {parts}/{number}"
                yield _record(row, self.columns, name, index=None)
            except SampleError as error:
                yield error


class HuggingFaceData(PixelDataModule):
    """A data set of the ``datasets`` package with an image column, and perhaps with masks, captions and other columns.

    Images are treated as by `latentdm.data.ImageFolderData`, which decodes them itself: at the size needed. Columns
    that hold further images are left out.

    ``index`` is the row's number; rows of ``val_split`` follow. In a stream, where rows have no number, it is a hash of
    the image's file (of 63 bits), alike in every epoch and place.

    Args:
        path: a data set's id on the hub, a local folder that ``load_dataset`` reads, or what ``save_to_disk`` wrote.
        size: side of the square images in pixels.
        batch_size: images a batch, on each device.
        name: which of the data set's configurations.
        revision: of the data set on the hub.
        split: the rows to train on.
        val_split: the rows to validate on; all of ``split`` then trains. None: a share of ``split``, and in a stream no
            validation.
        val_share: share of the rows that validate, in 0…1, where there is no ``val_split``. A hash of its number
            decides for each row.
        columns: our name → the data set's, where it is not the usual one: ``{image: photo, mask: matte, caption: en}``;
            ``mask: null`` leaves the masks out.
        streaming: read as a stream, without downloading it whole; the epoch then has a set length on every rank.
        epoch_length: training images an epoch of a stream, on all devices together.
        val_length: validation images of a stream.
        shuffle_buffer: images of a stream that each worker holds, as files, and draws from.
        alpha: keep transparency as a fourth channel.
        flip: mirror half of the training images, drawn for each sample and epoch.
        num_workers: processes that read images.
        seed: the order and the crops follow from it.
        on_error: ``"raise"`` or ``"skip"``, see `PixelDataModule`.
        max_skipped_share: the share of broken samples that ``skip`` bears.
        max_pixels: a larger image counts as broken, and is not decoded.

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
        alpha: bool = False,
        flip: bool = False,
        num_workers: int = 0,
        seed: int = 0,
        on_error: str = "raise",
        max_skipped_share: float = 0.05,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, on_error, max_skipped_share)
        check_at_least(1, OWNER, size=size, max_pixels=max_pixels, epoch_length=epoch_length, val_length=val_length)
        check_at_least(0, OWNER, shuffle_buffer=shuffle_buffer)
        check_share(OWNER, val_share)
        unknown = set(columns or {}) - set(USUAL)
        if unknown:
            raise UserError(
                f"{OWNER}: columns: unknown name {min(unknown)!r}; the names are {', '.join(USUAL)}, "
                "and other columns ride along under their own"
            )
        self.path = path
        self.size = size
        self.name = name
        self.revision = revision
        self.split = split
        self.val_split = val_split
        self.val_share = val_share
        self.columns = dict(columns or {})
        self.streaming = streaming
        self.epoch_length = epoch_length
        self.val_length = val_length
        self.shuffle_buffer = shuffle_buffer
        self.alpha = alpha
        self.flip = flip
        self.max_pixels = max_pixels

    def prepare_data(self) -> None:
        """Download, on one process of each node; ValueError where there is no such data set or split."""
        self._load(self.split)
        if self.val_split is not None:
            self._load(self.val_split)

    def setup(self, stage: str | None = None) -> None:
        """Open the data set and set the datasets, whatever the stage.

        Raises:
            ValueError: there is no such data set or split, or a column is missing; it names those that are there.
            ImportError: datasets is missing.
        """
        dataset, columns = self._open(self.split)
        held_out, val_columns = self._open(self.val_split) if self.val_split is not None else (None, columns)
        train_squares, squares = self._squares(training=True), self._squares(training=False)
        if self.streaming:
            settings = (self.shuffle_buffer, self.seed)
            self.train_set = HuggingFaceStream(
                dataset, columns, train_squares, self.epoch_length, True, *settings, self.split
            )
            if held_out is not None:
                val = (held_out, val_columns, squares, self.val_length, False, *settings, str(self.val_split))
                self.val_set = self.test_set = self.predict_set = HuggingFaceStream(*val)
            return
        train = np.arange(len(dataset))
        if held_out is not None:
            rows = np.arange(len(held_out))
            self.val_set = HuggingFaceImages(held_out, rows, val_columns, squares, len(dataset), str(self.val_split))
        else:
            train, rows = split_hashes(np.array([unit_hash(str(row)) for row in train]), self.val_share)
            self.val_set = HuggingFaceImages(dataset, rows, columns, squares, 0, self.split) if len(rows) else None
        self.train_set = HuggingFaceImages(dataset, train, columns, train_squares, 0, self.split)
        self.test_set = self.val_set
        self.predict_set = HuggingFaceImages(dataset, np.arange(len(dataset)), columns, squares, 0, self.split)

    def _squares(self, training: bool) -> Squares:
        return Squares(OWNER, self.size, training, self.flip and training, self.alpha, self.seed, self.max_pixels)

    def _load(self, split: str) -> Any:
        datasets = require("datasets", extra="huggingface", needed_by=OWNER)
        folder = Path(self.path).expanduser()
        if any((folder / file).is_file() for file in ("state.json", "dataset_dict.json")):  # by save_to_disk
            loaded = datasets.load_from_disk(str(folder))
            if isinstance(loaded, datasets.DatasetDict):
                if split not in loaded:
                    raise UserError(f"{OWNER}: there is no split {split!r} in {folder}; it has {', '.join(loaded)}")
                loaded = loaded[split]
            return loaded.to_iterable_dataset() if self.streaming else loaded
        path = str(folder) if folder.is_dir() else self.path
        try:
            return datasets.load_dataset(path, self.name, split=split, revision=self.revision, streaming=self.streaming)
        except (OSError, ValueError) as error:
            said = " ".join(str(error).split()).rstrip(".")
            why = f"{OWNER}: cannot load split {split!r} of path={self.path!r}: {said}"
            if isinstance(error, ConnectionError | FileNotFoundError) and not folder.is_dir():
                why += (
                    "; there is no such folder here, and the hub gave nothing: out of reach and not in its cache, a "
                    "data set that wants a login (hf auth login), or a wrong id. Without a network HF_HUB_OFFLINE=1 in "
                    "the environment asks the cache alone, without retries"
                )
            raise UserError(why) from error

    def _open(self, split: str) -> tuple[Any, dict[str, str]]:
        """The rows, with their images as files, and our name → the column that holds it."""
        datasets = require("datasets", extra="huggingface", needed_by=OWNER)
        dataset = self._load(split)
        names = list(dataset.column_names or next(iter(dataset)))
        columns: dict[str, str] = {}
        for ours, usual in USUAL.items():
            theirs = self.columns[ours] if ours in self.columns else next((n for n in usual if n in names), None)
            if theirs is None and ours != "image":
                continue
            if theirs is None or theirs not in names:
                raise UserError(
                    f"{OWNER}: no column {theirs or ours!r} for {ours} in {self.path}; it has {', '.join(names)}: "
                    f"say which with columns={{{ours}: …}}"
                )
            columns[ours] = theirs
        for column, feature in (dataset.features or {}).items():
            if isinstance(feature, datasets.Image):
                if column not in columns.values():
                    dataset = dataset.remove_columns(column)
                else:
                    dataset = dataset.cast_column(column, datasets.Image(decode=False))
        return dataset, columns


def _record(row: Mapping[str, Any], columns: Mapping[str, str], name: str, index: int | None) -> Record:
    """A row as a record; without an index, its image's file gives one."""
    image = _source(row[columns["image"]], f"the image of {name}")
    mask = _source(row[columns["mask"]], f"the mask of {name}") if "mask" in columns else None
    others = {column: value for column, value in row.items() if column not in columns.values()}
    if CAPTION in columns:
        others[CAPTION] = row[columns[CAPTION]]
    if index is None:
        index = stable_index(image if isinstance(image, bytes) else str(image))
    return Record(name, index, image, mask, others)


def _source(value: Any, what: str) -> Source:
    """The file that an image column holds: its content, or where it lies."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        return Path(value)
    if isinstance(value, bytes):
        return value
    raise SampleError(f"{OWNER}: cannot read {what}: it is {value!r} and no file; remove the row")
