"""`TextEncoder`: captions → prompt embeddings, by frozen text encoders in a dtype of their own.

Shapes: ``b`` batch, ``l`` tokens, ``d`` channels.
"""

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any, Self

import torch
from torch import Tensor, nn

from latentdm.batch import POOLED_PROMPT_EMBEDS, PROMPT_EMBEDS
from latentdm.draws import Draws
from latentdm.errors import UserError
from latentdm.extras import require
from latentdm.frozen.contexts import no_autocast, untracked
from latentdm.frozen.weights import DTYPES, computes_bfloat16
from latentdm.pipelines import PipelineSource
from latentdm.shown import one_line
from latentdm.stages import Stage
from latentdm.tensors import dtype_name
from latentdm.text.families import FAMILIES, family_of
from latentdm.text.tokens import Tokenizer
from latentdm.validation import Check

LONG = 512
"""Tokens of a T5 caption, as FLUX's pipelines have it."""

Load = Callable[[torch.dtype], Sequence[nn.Module]]


class TextEncoder(Stage):
    """Adds what a pipeline's ``encode_prompt`` gives: ``prompt_embeds`` and, for SDXL and FLUX, pooled embeddings.

    It is two stages: `tokenizer` on the host, and this one on the device, which drops the tokens. Its weights are
    loaded in `setup`, straight in their dtype, and never train. Like a `FrozenVAE` it is no ``nn.Module``, so that
    whoever holds it does not save, wrap or synchronise it.

    An empty caption, such as one that was dropped, gives what the pipeline uses for "no prompt" in classifier-free
    guidance, since that is what dropping teaches: for Stable Diffusion and FLUX the embedding of an empty text; for
    SDXL zeros where the pipeline's config says ``force_zeros_for_empty_prompt``, as SDXL's own does.

    Args:
        tokenizers: of the transformers package, one for each text encoder.
        encoders: the text encoders, or a function that loads them in a dtype, which is called in `setup`.
        family: ``"clip"`` (Stable Diffusion 1.x and 2.x), ``"sdxl"`` or ``"flux"``.
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"auto"``: bfloat16 where the device computes in it
            natively, else float32. Autocast never changes it; embeddings are float32 always.
        max_length: tokens of a T5 caption; None is 512. CLIP has a length of its own.
        zero_empty: whether empty captions give zeros.

    Raises:
        UserError: a value out of range.

    Example:
        >>> text = TextEncoder.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")  # doctest: +SKIP
        >>> text.encode(["a red house", ""])["prompt_embeds"].shape  # doctest: +SKIP
        torch.Size([2, 77, 768])
    """

    def __init__(
        self,
        tokenizers: Sequence[Any],
        encoders: Sequence[nn.Module] | Load,
        family: str,
        dtype: str = "auto",
        max_length: int | None = None,
        zero_empty: bool = False,
    ) -> None:
        check = Check("TextEncoder")
        check.choice("family", family, FAMILIES)
        self.family = family
        self._family = FAMILIES[family]
        self._wanted = DTYPES[check.choice("dtype", dtype, DTYPES)]
        self.zero_empty = zero_empty
        self.tokenizer = Tokenizer(tokenizers, self._lengths(tokenizers, max_length, check))
        self._load = encoders if callable(encoders) else None
        self._encoders = [] if callable(encoders) else [_frozen(encoder, self._wanted) for encoder in encoders]
        self.reads = self.drops = self.tokenizer.writes
        self.writes = (PROMPT_EMBEDS, POOLED_PROMPT_EMBEDS) if self._family.pooled else (PROMPT_EMBEDS,)
        self._device = torch.device("cpu")

    @classmethod
    def from_pretrained(
        cls,
        source: str | PathLike[str],
        dtype: str = "auto",
        max_length: int | None = None,
        zero_empty: bool | None = None,
        revision: str | None = None,
        variant: str | None = None,
    ) -> Self:
        """The text encoders of a pipeline. The tokenizers are loaded now, the weights in `setup`.

        Args:
            source: a pipeline's folder or hub id.
            dtype: as for the class.
            max_length: as for the class.
            zero_empty: as for the class; None does as the pipeline's config says.
            revision: of a hub repository.
            variant: of the weights' files, such as ``"fp16"``.

        Raises:
            MissingExtraError: the transformers package is not installed.
            UserError: there is no pipeline, it lacks a text encoder, or has one of another kind.
        """
        transformers = require("transformers", "finetune", "TextEncoder")
        pipeline = PipelineSource("TextEncoder", source, revision, variant)
        family = family_of(pipeline)
        parts = FAMILIES[family].parts
        if zero_empty is None:
            zero_empty = family == "sdxl" and bool(pipeline.index.get("force_zeros_for_empty_prompt", True))
        tokenizers = [pipeline.load(transformers, f"tokenizer{part}") for part in parts]

        def load(dtype: torch.dtype) -> list[nn.Module]:
            return [pipeline.load(transformers, f"text_encoder{part}", dtype=dtype) for part in parts]

        return cls(tokenizers, load, family, dtype, max_length, zero_empty)

    # ---------------------------------------------------------------- where it lies

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in. ``"auto"`` is settled by the first device that it is put on, and stays."""
        dtype: torch.dtype = next(self.encoders[0].parameters()).dtype
        return dtype

    @property
    def encoders(self) -> list[Any]:
        """The modules, loaded now if they were not yet."""
        self.load(self._device)
        return self._encoders

    def setup(self, device: torch.device | str) -> None:
        """Load the weights, the first time, and move them to ``device``."""
        self.to(device)

    def load(self, device: torch.device | str) -> None:
        """Load the weights in the dtype that they have on a device, and leave them on the CPU; once."""
        if self._load is None:
            return
        dtype = self._wanted or (torch.bfloat16 if computes_bfloat16(torch.device(device)) else torch.float32)
        with torch.inference_mode(False):
            self._encoders = [_frozen(encoder) for encoder in self._load(dtype)]
        self._load = None

    def to(self, device: torch.device | str) -> Self:
        """Move it to a device; the first time, settle its dtype there."""
        self._device = torch.device(device)
        with torch.inference_mode(False):
            self._encoders = [encoder.to(self._device) for encoder in self.encoders]
        return self

    def __repr__(self) -> str:
        dtype = "not loaded yet" if self._load is not None else dtype_name(self.dtype)
        return one_line(self, f"{dtype} on {self._device}")

    # ---------------------------------------------------------------- captions → embeddings

    def __call__(self, batch: Mapping[str, Any], draws: Draws) -> dict[str, Tensor]:
        """Encode the tokens of a batch.

        Args:
            batch: what `tokenizer` wrote, on the device.
            draws: unused.

        Returns:
            ``prompt_embeds`` ``b l d`` and, for SDXL and FLUX, ``pooled_prompt_embeds`` ``b d``, float32.
        """
        missing = [name for name in self.reads if name not in batch]
        if missing:
            raise UserError(f"TextEncoder: the batch has no {missing[0]!r}; let its tokenizer stage run before it")
        return self._encode([batch[name] for name in self.reads])

    def encode(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """What a call gives, for captions rather than a batch: in a notebook, or for the unconditional embedding."""
        return self._encode(self.tokenizer.tokens(captions))

    def _encode(self, tokens: Sequence[Tensor]) -> dict[str, Tensor]:
        with untracked(), no_autocast(self._device):
            ids = [part.to(self._device, copy=part.is_inference()) for part in tokens]
            prompt, pooled = self._family.encode(self.encoders, ids)
            embeddings = {PROMPT_EMBEDS: prompt.float()}
            if pooled is not None:
                embeddings[POOLED_PROMPT_EMBEDS] = pooled.float()
            if self.zero_empty:
                empty = self.tokenizer.is_empty(ids)
                embeddings = {name: _zeroed(rows, empty) for name, rows in embeddings.items()}
        return embeddings

    def _lengths(self, tokenizers: Sequence[Any], max_length: int | None, check: Check) -> list[int]:
        lengths = [int(tokenizer.model_max_length) for tokenizer in tokenizers]
        long = self._family.long_part
        if long is None:
            if max_length is not None:
                raise UserError(
                    f"TextEncoder: max_length={max_length!r} is for T5 (FLUX); CLIP reads {lengths[0]} tokens; "
                    "leave it out (null)"
                )
            return lengths
        lengths[long] = LONG if max_length is None else check.integer("max_length", max_length, 1, LONG)
        return lengths


def _zeroed(embeddings: Tensor, rows: Tensor) -> Tensor:
    """``b …`` with zeros in the rows of a ``b`` bool mask."""
    return embeddings.masked_fill(rows.view(-1, *[1] * (embeddings.ndim - 1)), 0)


def _frozen(encoder: Any, dtype: torch.dtype | None = None) -> Any:
    if getattr(encoder.config, "use_attention_mask", False):
        raise UserError(
            f"TextEncoder: the config of this {type(encoder).__name__} sets use_attention_mask, which no Stable "
            "Diffusion or FLUX pipeline does; such an encoder is not supported"
        )
    return encoder.requires_grad_(False).eval().to(dtype)
