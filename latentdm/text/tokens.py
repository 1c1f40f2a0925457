"""`Tokenizer`: captions → tokens, on the host.

Shapes: ``b`` batch, ``l`` tokens.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from latentdm.batch import CAPTION
from latentdm.draws import Draws
from latentdm.errors import UserError
from latentdm.stages import Stage
from latentdm.tensors import describe

TOKENS = "caption_tokens"


class Tokenizer(Stage):
    """Adds the tokens of the captions, one tensor for each text encoder, padded and cut to a fixed length.

    The first caption that is too long warns; later ones are cut without a word.

    Args:
        tokenizers: of the transformers package.
        lengths: tokens that each gives.

    Example:
        >>> tokenizer({"caption": ["a red house", ""]}, draws)["caption_tokens"].shape  # doctest: +SKIP
        torch.Size([2, 77])
    """

    reads = (CAPTION,)
    on_host = True

    def __init__(self, tokenizers: Sequence[Any], lengths: Sequence[int]) -> None:
        self.tokenizers = list(tokenizers)
        self.lengths = list(lengths)
        self.writes = tuple(TOKENS + (f"_{number}" if number > 1 else "") for number in range(1, len(lengths) + 1))
        self.empty = [tokens[0] for tokens in self.tokens([""])]
        self._warned = False

    def __call__(self, batch: Mapping[str, Any], draws: Draws) -> dict[str, Tensor]:
        """Tokenize the captions.

        Args:
            batch: ``caption``, a list of ``b`` strings; None counts as empty.
            draws: unused.

        Returns:
            ``caption_tokens`` (and ``caption_tokens_2``) ``b l`` int64 on the CPU.

        Raises:
            UserError: there are no captions, or they are no strings.
        """
        captions = self._captions(batch)
        tokenized = self._tokenized(captions)
        self._warn_if_cut(captions, tokenized)
        return {name: one["input_ids"] for name, one in zip(self.writes, tokenized, strict=True)}

    def tokens(self, captions: Sequence[str]) -> list[Tensor]:
        """``b l`` int64 for each text encoder."""
        return [one["input_ids"] for one in self._tokenized(captions)]

    def _tokenized(self, captions: Sequence[str]) -> list[Any]:
        """For each text encoder ``input_ids`` and ``attention_mask``, which is 0 for padding: ``b l`` int64."""
        settings = {"padding": "max_length", "truncation": True, "return_attention_mask": True, "return_tensors": "pt"}
        return [
            tokenizer(list(captions), max_length=length, **settings)
            for tokenizer, length in zip(self.tokenizers, self.lengths, strict=True)
        ]

    def is_empty(self, tokens: Sequence[Tensor]) -> Tensor:
        """``b`` bool: whose tokens, of all text encoders, are those of the empty caption."""
        pairs = zip(tokens, self.empty, strict=True)
        return torch.stack([(ids == empty.to(ids.device)).all(dim=1) for ids, empty in pairs]).all(dim=0)

    def _captions(self, batch: Mapping[str, Any]) -> list[str]:
        found = batch.get(CAPTION)
        if found is None:
            raise UserError(
                f"TextEncoder: the batch has no {CAPTION!r}, only {', '.join(map(repr, batch))}; give the images "
                f"captions (name.txt beside name.png), or name the key that has them: keys={{{CAPTION}: …}}"
            )
        if isinstance(found, str) or not isinstance(found, Sequence):
            raise UserError(f"TextEncoder: {CAPTION}: expected a list of strings, one an image, got {describe(found)}")
        captions = ["" if caption is None else caption for caption in found]
        for caption in captions:
            if not isinstance(caption, str):
                raise UserError(
                    f"TextEncoder: {CAPTION}: expected strings, got {caption!r}; of several captions of an image "
                    "the captions settings draw one: captions=dropout captions.dropout=0"
                )
        return captions

    def _warn_if_cut(self, captions: Sequence[str], tokenized: Sequence[Any]) -> None:
        if self._warned:
            return
        for tokenizer, length, one in zip(self.tokenizers, self.lengths, tokenized, strict=True):
            full = one["attention_mask"].all(dim=1).nonzero().flatten().tolist()  # the others have room to spare
            if not full:
                continue
            whole = tokenizer([captions[row] for row in full], verbose=False)["input_ids"]
            count, row = max((len(ids), -row) for ids, row in zip(whole, full, strict=True))
            if count > length:
                self._warned = True
                warnings.warn(
                    f"TextEncoder: a caption of {count} tokens is cut to the {length} that its encoder reads: "
                    f"{captions[-row][:60]!r}…; this is said once, shorten such captions",
                    stacklevel=3,
                )
                return
