"""How each kind of pipeline turns tokens into prompt embeddings.

Shapes: ``b`` batch, ``l`` tokens, ``d`` channels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latentdm.errors import UserError
from latentdm.pipelines import PipelineSource

Encode = Callable[[Sequence[Any], Sequence[Tensor]], tuple[Tensor, Tensor | None]]
"""Text encoders and the tokens of each, ``b l`` → prompt embeddings ``b l d`` and pooled ones ``b d`` or None."""


@dataclass(frozen=True)
class TextFamily:
    """A kind of text conditioning.

    Attributes:
        classes: of a pipeline's text encoders.
        encode: what the pipeline's ``encode_prompt`` computes.
        pooled: whether it gives pooled embeddings.
        long_part: index of the part whose length a user chooses, the default length being 512; None has none.
    """

    classes: tuple[str, ...]
    encode: Encode
    pooled: bool
    long_part: int | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """Ends of the components' names: ``""`` for ``tokenizer`` and ``text_encoder``, ``"_2"`` for the second."""
        return ("", "_2")[: len(self.classes)]


def _clip(encoders: Sequence[Any], tokens: Sequence[Tensor]) -> tuple[Tensor, None]:
    return encoders[0](tokens[0])[0], None


def _sdxl(encoders: Sequence[Any], tokens: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The layer before the last of both, side by side, and the projection of the second."""
    results = [encoder(ids, output_hidden_states=True) for encoder, ids in zip(encoders, tokens, strict=True)]
    return torch.cat([result.hidden_states[-2] for result in results], dim=-1), results[-1][0]


def _flux(encoders: Sequence[Any], tokens: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """T5's last layer without an attention mask, and CLIP's pooled output."""
    return encoders[1](tokens[1])[0], encoders[0](tokens[0]).pooler_output


FAMILIES = {
    "clip": TextFamily(("CLIPTextModel",), _clip, pooled=False),
    "sdxl": TextFamily(("CLIPTextModel", "CLIPTextModelWithProjection"), _sdxl, pooled=True),
    "flux": TextFamily(("CLIPTextModel", "T5EncoderModel"), _flux, pooled=True, long_part=1),
}
"""Name → family: Stable Diffusion 1.x and 2.x, SDXL, FLUX.1."""


def family_of(pipeline: PipelineSource) -> str:
    """The family of a pipeline, by the classes of its text encoders.

    Raises:
        UserError: it is of another family, or lacks a tokenizer or text encoder.
    """
    names = [name for name in ("text_encoder", "text_encoder_2", "text_encoder_3") if name in pipeline.components]
    classes = tuple(pipeline.class_name(name) for name in names or ["text_encoder"])
    for name, family in FAMILIES.items():
        if family.classes == classes:
            for part in family.parts:
                pipeline.class_name(f"tokenizer{part}")
            return name
    known = "; ".join(" + ".join(family.classes) for family in FAMILIES.values())
    raise UserError(
        f"{pipeline.owner}: the text encoders of {pipeline.source!r} ({pipeline.pipeline_class}) are "
        f"{' + '.join(classes)}; known are {known}"
    )
