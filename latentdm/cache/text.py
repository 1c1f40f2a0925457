"""Text embeddings by caption: what a frozen text encoder gave once is read ever after.

They are found by a hash over the tokens, which say all of the caption and the tokenizer that the encoder sees of them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentdm.autoencoders.fingerprint import weights_hash
from latentdm.batch import CAPTION
from latentdm.cache.keys import key_of
from latentdm.cache.store import Entry, Store, open_space
from latentdm.cache.writer import Writer
from latentdm.draws import Draws
from latentdm.stages import Stage
from latentdm.tensors import dtype_name
from latentdm.text.encoder import TextEncoder

CACHED_TEXT = "cached_text"


class CachedText:
    """What a batch carries of it.

    Args:
        keys: of its rows.
        rows: which were found.
        found: output → ``n …`` of those.
    """

    def __init__(self, keys: list[bytes], rows: list[int], found: dict[str, Tensor]) -> None:
        self.keys, self.rows, self.found = keys, rows, found

    def to(self, device: Any, **settings: Any) -> "CachedText":
        """With its tensors on a device."""
        moved = {name: tensor.to(device, non_blocking=True, **settings) for name, tensor in self.found.items()}
        return CachedText(self.keys, self.rows, moved)


class TextCache:
    """The entries of a text encoder.

    Args:
        writer: of the cache.
        dtype: that is kept; None: the encoder's, with which nothing is lost.

    Attributes:
        hits: captions found so far.
        misses: captions looked for in vain.
    """

    def __init__(self, writer: Writer, dtype: torch.dtype | None) -> None:
        self.writer = writer
        self.dtype = dtype
        self.kept = torch.float32
        self.store: Store | None = None
        self.hits = self.misses = 0

    def open(self, root: Path, text: TextEncoder) -> Store:
        """Open the entries of an encoder whose weights are there; they are hashed."""
        self.kept = self.dtype or text.dtype
        space = {"format": 1, "store": dtype_name(self.kept), "text": fingerprint(text)}
        self.store = open_space(root, space)
        return self.store

    def read(self, keys: Sequence[bytes]) -> CachedText:
        """What is there of some captions."""
        assert self.store is not None
        entries: dict[bytes, Entry | None] = {}
        for key in keys:
            if key not in entries:
                entries[key] = self.store.read(key)
        found = [(row, entry) for row, key in enumerate(keys) if (entry := entries[key]) is not None]
        self.hits += len(found)
        self.misses += len(keys) - len(found)
        names = found[0][1].keys() if found else ()
        stacked = {name: torch.stack([entry[name] for _, entry in found]) for name in names}
        return CachedText(list(keys), [row for row, _ in found], stacked)


def fingerprint(text: TextEncoder) -> dict[str, Any]:
    """All that embeddings depend on beside the tokens, as JSON."""
    return {
        "encoders": [
            {
                "class": type(module).__qualname__,
                "config": repr(sorted(module.config.to_dict().items())) if hasattr(module, "config") else "",
                "weights": weights_hash(module),
            }
            for module in text.encoders
        ],
        "family": text.family,
        "dtype": dtype_name(text.dtype),
        "zero_empty": text.zero_empty,
        "empty": [tokens.tolist() for tokens in text.tokenizer.empty] if text.zero_empty else [],
    }


class CachedTokenizer(Stage):
    """A tokenizer that looks up what the encoder gave for its tokens.

    Args:
        tokenizer: the tokenizer.
        cache: where.
    """

    on_host = True

    def __init__(self, tokenizer: Stage, cache: TextCache) -> None:
        self.tokenizer = tokenizer
        self.cache = cache
        self.reads = tokenizer.reads
        self.writes = (*tokenizer.writes, CACHED_TEXT)

    def __call__(self, batch: Mapping[str, Any], draws: Draws) -> dict[str, Any]:
        """The tokens, and a `CachedText`."""
        tokens = self.tokenizer(batch, draws)
        if self.cache.store is None:  # nobody has opened it: a batch by hand
            return tokens
        parts = [tokens[name] for name in self.tokenizer.writes]
        keys = [key_of(*(part[row].numpy().tobytes() for part in parts)) for row in range(len(parts[0]))]
        return tokens | {CACHED_TEXT: self.cache.read(keys)}


class CachedTextEncoder(Stage):
    """A text encoder that encodes what the cache lacks, and leaves the device while it lacks nothing.

    Args:
        text: the encoder.
        cache: where.

    Attributes:
        waits: for the writer, rather than drop what comes too fast.
    """

    def __init__(self, text: TextEncoder, cache: TextCache) -> None:
        self.text = text
        self.cache = cache
        self.tokenizer = CachedTokenizer(text.tokenizer, cache)
        self.reads = text.reads
        self.writes = text.writes
        self.drops = (*text.drops, CACHED_TEXT)
        self.waits = False
        self._device = torch.device("cpu")

    def setup(self, device: torch.device | str) -> None:
        """Make the encoder, in its dtype on the device; it moves there when a caption is missing."""
        self._device = torch.device(device)
        self.text.load(device)
        self.rest()

    def rest(self) -> None:
        """Leave the device, until a caption is missing."""
        if self.text.device.type != "cpu":
            self.text.to("cpu")

    def __call__(self, batch: Mapping[str, Any], draws: Draws) -> dict[str, Tensor]:
        """What the encoder gives, read where it was found."""
        cached = batch.get(CACHED_TEXT)
        if not isinstance(cached, CachedText):
            return self._encoded(batch, draws)
        if len(cached.rows) == len(cached.keys):
            return {name: tensor.float() for name, tensor in cached.found.items()}
        there = set(cached.rows)
        first: dict[bytes, int] = {}
        lacking = [row for row in range(len(cached.keys)) if row not in there]
        for row in lacking:
            first.setdefault(cached.keys[row], row)  # a caption that comes twice is encoded once
        chosen = list(first.values())
        some = {name: batch[name][chosen] for name in self.reads}
        fresh = self._encoded(some, draws)
        assert self.cache.store is not None
        kept = {name: tensor.to(self.cache.kept) for name, tensor in fresh.items()}
        self.cache.writer.put(self.cache.store, list(first), kept, wait=self.waits)
        place = {key: number for number, key in enumerate(first)}
        return {name: self._whole(cached, lacking, place, name, tensor) for name, tensor in fresh.items()}

    def fill(self, captions: Sequence[str], at_once: int = 64) -> None:
        """Encode and keep those of some captions that are not there."""
        for first in range(0, len(captions), at_once):
            draws = Draws(0, 0, list(range(first, min(first + at_once, len(captions)))), training=False)
            batch = self.tokenizer({CAPTION: captions[first : first + at_once]}, draws)
            self({name: value.to(self._device) for name, value in batch.items()}, draws)

    def _whole(
        self, cached: CachedText, lacking: Sequence[int], place: Mapping[bytes, int], name: str, fresh: Tensor
    ) -> Tensor:
        whole = fresh.new_empty(len(cached.keys), *fresh.shape[1:])
        whole[lacking] = fresh[[place[cached.keys[row]] for row in lacking]]
        if cached.rows:
            whole[cached.rows] = cached.found[name].to(fresh)
        return whole

    def _encoded(self, batch: Mapping[str, Any], draws: Draws) -> dict[str, Tensor]:
        if self.text.device != self._device:
            self.text.to(self._device)
        return self.text(batch, draws)
