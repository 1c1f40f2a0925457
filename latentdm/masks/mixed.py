"""A mixture of mask sources: each sample draws one."""

from collections.abc import Mapping
from itertools import accumulate

import torch
from torch import Tensor

from latentdm.batch import MASK, PIXELS, unit_mask
from latentdm.draws import Draws
from latentdm.errors import UserError
from latentdm.masks.sources import MaskSource


class MixedMask(MaskSource):
    """Several mask sources with a probability each; every sample draws one by its own draw.

    Args:
        sources: name → source.
        probabilities: name → its weight, at least 0; they are divided by their sum. None: all alike.

    Raises:
        ValueError: no sources, or weights that do not name them all or do not make probabilities; when called: a
            source lacks what it reads, whether or not a sample of this batch drew it.

    Example:
        >>> sources = {"own": BatchMask(), "random": RandomMask()}
        >>> MixedMask(sources, {"own": 0.75, "random": 0.25})  # doctest: +SKIP
    """

    def __init__(self, sources: Mapping[str, MaskSource], probabilities: Mapping[str, float] | None = None) -> None:
        for name, source in sources.items():
            if not isinstance(source, MaskSource):
                raise UserError(f"MixedMask: sources.{name} must be a mask source, got {type(source).__name__}")
        weights = dict.fromkeys(sources, 1.0) if probabilities is None else dict(probabilities)
        if not sources or weights.keys() != sources.keys():
            raise UserError(
                f"MixedMask: probabilities must name each source once; the sources are {', '.join(sources) or 'none'}, "
                f"the probabilities name {', '.join(weights) or 'none'}"
            )
        if any(not 0 <= weight < float("inf") for weight in weights.values()) or not sum(weights.values()) > 0:
            raise UserError(f"MixedMask: probabilities must be at least 0 and not all 0, got {weights}")
        self.sources = dict(sources)
        total = sum(weights.values())
        self.bounds = torch.tensor([bound / total for bound in accumulate(weights[name] for name in sources)])

    def __call__(self, inputs: Mapping[str, Tensor], draws: Draws) -> Tensor:
        """``b 1 H W`` float32 in 0…1."""
        self.check(inputs)
        pixels = inputs[PIXELS]
        mask = inputs.get(MASK)
        if mask is not None and len(mask) == 1:  # one for all
            inputs = {**inputs, MASK: mask.expand(len(pixels), *mask.shape[1:])}
        drawn = torch.bucketize(draws.uniform("mask source", 1)[:, 0], self.bounds[:-1], right=True)
        masks = pixels.new_empty(len(pixels), 1, *pixels.shape[-2:], dtype=torch.float32)
        for number, source in enumerate(self.sources.values()):
            rows = (drawn == number).nonzero().flatten()
            if len(rows) == 0:
                continue
            there = rows.to(pixels.device, non_blocking=True)
            some = {
                name: value.index_select(0, there) if isinstance(value, Tensor) and value.ndim else value
                for name, value in inputs.items()
            }
            made = unit_mask(source(some, draws.of(rows.tolist())), some[PIXELS], type(source).__name__)
            masks.index_copy_(0, there, made)
        return masks

    def check(self, inputs: Mapping[str, Tensor]) -> None:
        """Raise ValueError where a source of the mixture lacks what it reads."""
        for name, source in self.sources.items():
            try:
                source.check(inputs)
            except UserError as error:
                raise UserError(f"MixedMask: sources.{name}: {error}") from None
