"""Text embeddings by caption: what a frozen text encoder gave once is read ever after.

They are found by a hash over the tokens, which say all of the caption and the tokenizer that the encoder sees of them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from latentdm.autoencoders.fingerprint import weights_hash
from latentdm.batch import CAPTION
from latentdm.cache.keys import key_of
from latentdm.cache.store import Store, open_space
from latentdm.cache.writer import Writer
from latentdm.draws import Draws
from latentdm.stages import Stage
from latentdm.tensors import dtype_name
from latentdm.text.encoder import TextEncoder

CACHED_TEXT = "cached_text"


class CachedText(NamedTuple):
    """What a batch carries of it.

    Attributes:
        keys: of its rows.
        rows: which were found.
        found: output → ``n …`` of those.
    """

    keys: list[bytes]
    rows: list[int]
    found: dict[str, Tensor]

    def to(self, device: Any, **settings: Any) -> "CachedText":
        """With its tensors on a device."""
        moved = {name: tensor.to(device, non_blocking=True, **settings) for name, tensor in self.found.items()}
        return self._replace(found=moved)


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
        encoder: whose tokenizer it is.
    """

    on_host = True

    def __init__(self, encoder: "CachedTextEncoder") -> None:
        self.encoder = encoder
        self.tokenizer = encoder.text.tokenizer
        self.reads = self.tokenizer.reads
        self.writes = (*self.tokenizer.writes, CACHED_TEXT)

    def __call__(self, batch: Mapping[str, Any], draws: Draws) -> dict[str, Any]:
        """The tokens, and a `CachedText`."""
        tokens = self.tokenizer(batch, draws)
        store = self.encoder.store
        if store is None:  # nobody has opened it: a batch by hand
            return tokens
        parts = [tokens[name] for name in self.tokenizer.writes]
        keys = [key_of(*(part[row].numpy().tobytes() for part in parts)) for row in range(len(parts[0]))]
        entries = {key: store.read(key) for key in dict.fromkeys(keys)}
        found = {row: entry for row, key in enumerate(keys) if (entry := entries[key]) is not None}
        names = next(iter(found.values()), {})
        stacked = {name: torch.stack([entry[name] for entry in found.values()]) for name in names}
        return tokens | {CACHED_TEXT: CachedText(keys, list(found), stacked)}


class CachedTextEncoder(Stage):
    """A text encoder that encodes what the cache lacks, and leaves the device while it lacks nothing.

    Args:
        text: the encoder.
        writer: of the cache.
        dtype: that is kept; None: the encoder's, with which nothing is lost.

    Attributes:
        store: the entries; None: nobody has opened them.
        waits: for the writer, rather than drop what comes too fast.
    """

    def __init__(self, text: TextEncoder, writer: Writer, dtype: torch.dtype | None) -> None:
        self.text = text
        self.writer = writer
        self.store: Store | None = None
        self.tokenizer = CachedTokenizer(self)
        self.reads = text.reads
        self.writes = text.writes
        self.drops = (*text.drops, CACHED_TEXT)
        self.waits = False
        self._kept = dtype
        self._device = torch.device("cpu")
        self._worked = False

    def open(self, root: Path) -> None:
        """Open the entries of the encoder, whose weights are there; they are hashed."""
        space = {"format": 1, "store": dtype_name(self._kept or self.text.dtype), "text": fingerprint(self.text)}
        self.store = open_space(root, space)

    def setup(self, device: torch.device | str) -> None:
        """Make the encoder, in its dtype on the device; it moves there when a caption is missing."""
        self._device = torch.device(device)
        self.text.load(device)
        self._worked = False
        self.rest()

    def rest(self) -> None:
        """Leave the device until a caption is missing, if none was since this was last asked for."""
        if not self._worked and self.text.device.type != "cpu":
            self.text.to("cpu")
        self._worked = False

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
        assert self.store is not None
        kept = {name: tensor.to(self._kept or self.text.dtype) for name, tensor in fresh.items()}
        self.writer.put(self.store, list(first), kept, wait=self.waits)
        order = {key: number for number, key in enumerate(first)}
        spread = [order[cached.keys[row]] for row in lacking]
        whole = {name: tensor.new_empty(len(cached.keys), *tensor.shape[1:]) for name, tensor in fresh.items()}
        for name, tensor in fresh.items():
            whole[name][lacking] = tensor[spread]
            if cached.rows:
                whole[name][cached.rows] = cached.found[name].to(tensor)
        return whole

    def fill(self, captions: Sequence[str], at_once: int = 64) -> None:
        """Encode and keep those of some captions that are not there."""
        for first in range(0, len(captions), at_once):
            draws = Draws(0, 0, list(range(first, min(first + at_once, len(captions)))), training=False)
            batch = self.tokenizer({CAPTION: captions[first : first + at_once]}, draws)
            self({name: value.to(self._device) for name, value in batch.items()}, draws)

    def _encoded(self, batch: Mapping[str, Any], draws: Draws) -> dict[str, Tensor]:
        self._worked = True
        if self.text.device != self._device:
            self.text.to(self._device)
        return self.text(batch, draws)
