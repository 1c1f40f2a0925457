"""Tar shards of images, as webdataset writes them: local or remote, read as a stream.

The package ``webdataset`` reads the shards; how they are split and repeated is `latentdm.data.stream`'s.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from latentdm.batch import CAPTION
from latentdm.data.decode import EXTENSIONS, MAX_PIXELS
from latentdm.data.geometry import COMPANIONS, Record
from latentdm.data.metadata import CAPTION_COLUMNS, rename
from latentdm.data.skips import SampleError
from latentdm.data.stream import Item, StreamDataModule, StreamImages, own_share, stable_index
from latentdm.errors import UserError, attributed
from latentdm.extras import require

OWNER = "WebDatasetData"

IMAGE_ENDINGS = tuple(ending[1:] for ending in EXTENSIONS)


@dataclass(frozen=True)
class ShardRecords:
    """The records of tar shards.

    Attributes:
        shards: paths or URLs.
        columns: our name → the ending of its files: ``{image: jpg, mask: mask.png, caption: txt}``.
    """

    shards: Sequence[str]
    columns: Mapping[str, str]

    @property
    def files(self) -> int:
        """The number of shards."""
        return len(self.shards)

    def __call__(self, part: int, parts: int, turn: int, shuffle: bool) -> Iterator[Item]:
        """This part's records, shard after shard; a shard that cannot be read gives an error and no more records."""
        shards = list(self.shards)
        if shuffle:
            Random(turn).shuffle(shards)
        return own_share(shards, self._read, part, parts)

    def _read(self, shard: str) -> Iterator[Item]:
        try:
            for files in _read_shard(shard):
                yield self._record(shard, files)
        except Exception as error:  # a file system, a network, a pipe or a broken tar: each has its own
            # webdataset appends the stream it was reading, as an argument and in the text, with its address in memory.
            text = error.strerror if isinstance(error, OSError) and error.strerror else next(iter(error.args), error)
            why = str(text).split(" @ <")[0]
            yield SampleError(f"cannot read the shard {shard}: {why}; replace or remove it")

    def _record(self, shard: str, files: Mapping[str, Any]) -> Item:
        key = files["__key__"]
        name = f"{shard}/{key}"
        image = self._find(files, "image", IMAGE_ENDINGS)
        if image is None:
            endings = ", ".join(ending for ending in files if not ending.startswith("__"))
            wanted = self.columns.get("image", ", ".join(IMAGE_ENDINGS))
            return SampleError(f"cannot read {name}: it has no image ({wanted}), only {endings}; remove it")
        companions = {k: self._find(files, k, [f"{k}.{ending}" for ending in IMAGE_ENDINGS]) for k in COMPANIONS}
        try:
            columns = {}
            if "json" in files and self.columns.get(CAPTION) != "json":
                content = json.loads(files["json"].decode("utf-8"))
                columns = rename(content, {}, CAPTION_COLUMNS, CAPTION) if isinstance(content, dict) else {}
            caption = self._find(files, CAPTION, ("txt", "caption"))
            if caption is not None:
                columns[CAPTION] = caption.decode("utf-8").strip()
            if "cls" in files:
                columns["cls"] = int(files["cls"])
        except ValueError as error:
            return SampleError(f"cannot read the texts of {name}: {error}; repair or remove it")
        return Record(name, stable_index(key), image, **companions, columns=columns)

    def _find(self, files: Mapping[str, Any], column: str, usual: Sequence[str]) -> bytes | None:
        endings = [self.columns[column]] if column in self.columns else usual
        return next((files[ending] for ending in endings if ending in files), None)


class WebDatasetData(StreamDataModule):
    """Tar shards of images, of their masks, sources and captions if they have any, and of their columns.

    A sample is the files of one name: ``0001.jpg`` (or any other image ending), ``0001.mask.png``, ``0001.source.jpg``,
    ``0001.txt`` with its caption, ``0001.json`` with its columns (``caption`` or ``text`` among them) and ``0001.cls``
    with a number. Other files are left out. Images are treated as by `latentdm.data.ImageFolderData`.

    Each epoch has a set length, the same on every rank, however unevenly the shards are filled. Shards are shuffled
    each epoch and dealt to ``parts``, which ranks and workers share; the order is the same for any number of them. Few
    shards are one part, of which each process reads all and decodes its own. Validation begins at the first shard each
    time. ``index`` is a hash of the name (of 63 bits),
    alike in every epoch and on every worker.

    Args:
        shards: paths or URLs, with braces (``photos-{0000..0099}.tar``); several as a list. ``pipe:`` takes a command
            that prints a shard; any other protocol is opened with fsspec (``s3://``, ``hf://``, ``https://``).
        size: side of the square images in pixels.
        batch_size: images a batch, on each device.
        epoch_length: training images an epoch, on all devices together.
        val_shards: shards to validate on; None: no validation.
        val_length: validation images.
        columns: our name → the ending of its files where it is another one: ``{mask: seg.png}``.
        shuffle_buffer: images that are held, as files, over all parts, and drawn from; 0: only shards are shuffled.
        parts: in how many the shards are read at most; the order follows from it. Fewer with less than eight shards a
            part.
        alpha: keep transparency as a fourth channel.
        flip: mirror half of the training images, drawn for each sample and epoch.
        num_workers: processes that read images.
        seed: the order and the crops follow from it.
        on_error: ``"raise"`` or ``"skip"``, see `PixelDataModule`; a shard that breaks off counts as one sample.
        max_skipped_share: the share of broken samples that ``skip`` bears.
        max_pixels: a larger image counts as broken, and is not decoded.

    Raises:
        ValueError: a setting is out of range; while reading: a broken shard or sample.
        ImportError: in ``setup``: webdataset is missing; the message names the extra.

    Example:
        ``WebDatasetData("shards/photos-{0000..0099}.tar", size=512, epoch_length=100_000)``
    """

    def __init__(
        self,
        shards: str | Sequence[str],
        size: int = 512,
        batch_size: int = 16,
        epoch_length: int = 1024,
        val_shards: str | Sequence[str] | None = None,
        val_length: int = 64,
        columns: Mapping[str, str] | None = None,
        shuffle_buffer: int = 256,
        parts: int = 64,
        alpha: bool = False,
        flip: bool = False,
        num_workers: int = 0,
        seed: int = 0,
        on_error: str = "raise",
        max_skipped_share: float = 0.05,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        super().__init__(
            epoch_length, val_length, shuffle_buffer, parts, size=size, alpha=alpha, flip=flip, max_pixels=max_pixels,
            batch_size=batch_size, num_workers=num_workers, seed=seed, on_error=on_error,
            max_skipped_share=max_skipped_share,
        )  # fmt: skip
        self.shards = shards
        self.val_shards = val_shards
        self.columns = dict(columns or {})

    @attributed(OWNER)
    def setup(self, stage: str | None = None) -> None:
        """Expand the braces and set the datasets, whatever the stage; no shard is opened.

        Raises:
            ValueError: there are no shards.
            ImportError: webdataset is missing.
        """
        self.train_set = self._dataset(self.shards, training=True)
        if self.val_shards is not None:
            self.val_set = self.test_set = self.predict_set = self._dataset(self.val_shards, training=False)

    def _dataset(self, shards: str | Sequence[str], training: bool) -> StreamImages:
        webdataset = require("webdataset", extra="webdataset", needed_by=OWNER)
        names = [shards] if isinstance(shards, str) else list(shards)
        expanded = [url for name in names for url in webdataset.shardlists.expand_urls(name)]
        if not expanded:
            raise UserError(f"shards={shards!r} names no shard; give a path, with braces for many")
        return self.stream(ShardRecords(expanded, self.columns), training)


def _read_shard(url: str) -> Iterator[dict[str, Any]]:
    """The samples of a shard: ending → content, and ``__key__``."""
    webdataset = require("webdataset", extra="webdataset", needed_by=OWNER)
    if url.startswith("pipe:"):
        opened = webdataset.gopen(url)
    else:
        opened = require("fsspec", extra="webdataset", needed_by=OWNER).open(url, "rb")
    with opened as stream:
        source = [{"url": url, "stream": stream}]
        yield from webdataset.tariterators.group_by_keys(webdataset.tariterators.tar_file_expander(source))
