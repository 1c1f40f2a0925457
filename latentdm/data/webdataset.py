"""Tar shards of images, as webdataset writes them: local or remote, read as a stream.

The package ``webdataset`` reads the shards; how they are split and repeated is `latentdm.data.stream`'s.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby
from operator import itemgetter
from random import Random
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from latentdm.batch import CAPTION
from latentdm.data.archives import check_shards, members, open_shard
from latentdm.data.budget import MAX_PIXELS
from latentdm.data.decode import EXTENSIONS
from latentdm.data.files import READ_TIMEOUT_S
from latentdm.data.geometry import COMPANIONS, Record
from latentdm.data.metadata import read_sidecar, rows_of_image
from latentdm.data.names import MARKS, SIDECARS, guesses
from latentdm.data.skips import SampleError
from latentdm.data.stream import Item, StreamDataModule, StreamImages, own_share, stable_index
from latentdm.data.texts import check, decode, quoted
from latentdm.errors import UserError, attributed
from latentdm.extras import require

OWNER = "WebDatasetData"

IMAGE_ENDINGS = tuple(ending[1:] for ending in EXTENSIONS)
SIDECAR_ENDINGS = tuple(ending[1:] for ending in SIDECARS)
PICTURE_ENDINGS = {"image": IMAGE_ENDINGS} | {
    kind: tuple(f"{mark}.{ending}" for mark in MARKS[kind] for ending in IMAGE_ENDINGS) for kind in COMPANIONS
}
KNOWN = frozenset([*SIDECAR_ENDINGS, "cls", *chain.from_iterable(PICTURE_ENDINGS.values())])
"""All endings that need not be named."""

MAX_TOLD = 20
"""Endings that are left out with a word: names with dots in them make one each."""


@dataclass
class Files:
    """The members of a shard that have one name.

    Attributes:
        key: the name up to its first dot.
        contents: ending, in lower case → content.
        twice: endings that are there more than once.
    """

    key: str
    contents: dict[str, bytes] = field(default_factory=dict)
    twice: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ShardRecords:
    """The records of tar shards.

    Attributes:
        shards: paths or URLs.
        columns: our name → the ending of its files: ``{image: jpg, mask: mask.png, caption: txt}``.
        told: endings of files that were left out, with a word.
    """

    shards: Sequence[str]
    columns: Mapping[str, str]
    told: set[str] = field(default_factory=set, compare=False)

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
        before: Files | SampleError | None = None
        sample = before
        for after in chain(_read_shard(shard), [None]):
            if isinstance(sample, Files):
                beside = [other.key for other in (before, after) if isinstance(other, Files)]
                yield self._record(shard, sample, beside)
            elif sample is not None:
                yield sample
            before, sample = sample, after

    def _record(self, shard: str, sample: Files, beside: Collection[str]) -> Item:
        files, name = sample.contents, f"{shard}/{sample.key}"
        try:
            self._check_name(sample.key, name, beside)
            if sample.twice:
                raise SampleError(f"cannot read {name}: it has two files ending in .{sample.twice[0]}; remove one")
            pictures: dict[str, Any] = {
                kind: self._find(files, kind, endings, name) for kind, endings in PICTURE_ENDINGS.items()
            }
            if pictures["image"] is None:
                wanted = self.columns.get("image", ", ".join(IMAGE_ENDINGS))
                raise SampleError(f"cannot read {name}: it has no image ({wanted}), only {', '.join(files)}; remove it")
            rows = self._rows(files, name)
        except SampleError as error:
            return error
        self._tell(files)
        return Record(name, stable_index(name), **pictures, rows=rows)

    def _tell(self, files: Mapping[str, bytes]) -> None:
        """Say which files are left out, once for each ending."""
        for ending in files:
            if ending not in KNOWN and ending not in self.columns.values() and ending not in self.told:
                if len(self.told) < MAX_TOLD:
                    rank_zero_info(f"{OWNER}: left out of shards: files ending in .{quoted(ending)[1:-1]}")
                self.told.add(ending)

    def _check_name(self, key: str, name: str, beside: Collection[str]) -> None:
        """A mask under a name of its own, as ``0001-mask.png``, would be trained on."""
        if "image" in self.columns:
            return
        for guess in guesses(f"{key}.png"):
            if guess.certain or guess.stem in beside:
                raise SampleError(
                    f"cannot read {name}: it is called like a mask or a label map of {guess.stem}; call it "
                    f"{guess.stem}.mask.png to make it one, or say columns={{image: png}} if it is an image"
                )

    def _rows(self, files: Mapping[str, bytes], name: str) -> list[dict[str, Any]]:
        """What is written about an image: see `rows_of_image`."""
        of_caption = self.columns.get(CAPTION)
        beside = []
        for ending in SIDECAR_ENDINGS if of_caption is None else dict.fromkeys(("json", of_caption)):
            if ending in files:
                columns = read_sidecar(files[ending], f"{name}.{ending}")
                if of_caption is not None and ending != of_caption:
                    columns.pop(CAPTION, None)
                beside.append(columns)
        if "cls" in files:
            what = f"{name}.cls"
            try:
                number = int(decode(files["cls"], what))
            except ValueError as error:
                raise SampleError(f"cannot read {what}: it holds no integer; repair or remove it") from error
            check(number, what)
            beside.append({"cls": number})
        return rows_of_image([], beside)

    def _find(self, files: Mapping[str, bytes], column: str, usual: Sequence[str], name: str) -> bytes | None:
        """The picture of a kind: under the ending that a user named, else under the only usual one."""
        if column in self.columns:
            return files.get(self.columns[column])
        found = [ending for ending in usual if ending in files and ending not in self.columns.values()]
        if len(found) > 1:
            one, other = found[:2]
            raise SampleError(
                f"cannot read {name}: its files {one} and {other} may both be its {column}; say which is, as in "
                f"columns={{{column}: {one}}}"
            )
        return files[found[0]] if found else None


class WebDatasetData(StreamDataModule):
    """Tar shards of images, of their masks, sources and captions if they have any, and of their columns.

    A sample is the files of one name: ``0001.jpg`` (or any other image ending), ``0001.mask.png``, ``0001.source.jpg``,
    ``0001.txt`` or ``0001.caption`` with its caption, ``0001.json`` with its columns (``caption`` or ``text`` among
    them) and ``0001.cls`` with a number. Other files are left out. Two images of one name, as ``0001.jpg`` and
    ``0001.png``, are an error until ``columns`` says which is which. Images and several captions are treated as by
    `latentdm.data.ImageFolderData`.

    Each epoch has a set length, the same on every rank, however unevenly the shards are filled. Shards are shuffled
    each epoch and dealt to ``parts``, which ranks and workers share; the order is the same for any number of them. Few
    shards are one part, of which each process reads all and decodes its own. Validation begins at the first shard each
    time. ``index`` is a hash of the shard's name and the sample's (of 63 bits), alike in every epoch and on every
    worker.

    Args:
        shards: paths or URLs, with braces (``photos-{0000..0099}.tar``); several as a list. ``pipe:`` runs a command
            that prints a shard, in a shell and with your rights, wherever it stands among them: only with
            ``allow_pipe``, and never from a list that somebody else wrote. Any other protocol is opened with fsspec
            (``s3://``, ``hf://``, ``https://``).
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
        random_crop: crop training images anywhere; otherwise in the centre, as all others.
        num_workers: processes that read images.
        seed: the order and the crops follow from it.
        on_error: ``"raise"`` or ``"skip"``, see `PixelDataModule`; a shard that breaks off counts as one sample.
        max_skipped_share: the share of broken samples that ``skip`` bears.
        max_pixels: a larger image counts as broken, and is not decoded.
        read_timeout: seconds that each reading from a shard may wait, see `PixelDataModule`.
        allow_pipe: run the commands of shards that begin with ``pipe:``, with your rights.

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
        random_crop: bool = True,
        num_workers: int = 0,
        seed: int = 0,
        on_error: str = "raise",
        max_skipped_share: float = 0.05,
        max_pixels: int = MAX_PIXELS,
        read_timeout: float = READ_TIMEOUT_S,
        allow_pipe: bool = False,
    ) -> None:
        super().__init__(
            epoch_length, val_length, shuffle_buffer, parts, size=size, alpha=alpha, flip=flip, max_pixels=max_pixels,
            random_crop=random_crop, batch_size=batch_size, num_workers=num_workers, seed=seed, on_error=on_error,
            max_skipped_share=max_skipped_share, read_timeout=read_timeout,
        )  # fmt: skip
        self.shards = shards
        self.val_shards = val_shards
        self.allow_pipe = allow_pipe
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
        check_shards(expanded, self.allow_pipe)
        if not expanded:
            raise UserError(f"shards={shards!r} names no shard; give a path, with braces for many")
        return self.stream(ShardRecords(expanded, self.columns), training)


def _read_shard(shard: str) -> Iterator[Files | SampleError]:
    """The samples of a shard, and last what is wrong with it; one that it breaks off in is not whole, and left out."""
    split = require("webdataset", extra="webdataset", needed_by=OWNER).tariterators.base_plus_ext
    try:
        with open_shard(shard, OWNER) as stream:
            files = ((*split(name), content) for name, content in members(stream, shard))
            for key, group in groupby(filter(itemgetter(0), files), itemgetter(0)):  # a name without an ending has none
                sample = Files(key)
                for _, ending, content in group:
                    if ending.lower() in sample.contents:
                        sample.twice.append(ending.lower())
                    sample.contents[ending.lower()] = content
                yield sample
    except SampleError as error:  # which names it
        yield error
    except Exception as error:  # a file system, a network, a pipe or a broken tar: each has its own
        # webdataset appends the stream it was reading, as an argument and in the text, with its address in memory.
        text = error.strerror if isinstance(error, OSError) and error.strerror else next(iter(error.args), error)
        yield SampleError(f"cannot read the shard {shard}: {str(text).split(' @ <')[0]}; replace or remove it")
