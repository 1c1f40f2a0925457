"""Growing masks: eight of 512², against the convolution of the original nodes."""

from collections.abc import Callable
from functools import cache
from statistics import median

import torch

from benchmarks.models import batch
from benchmarks.peers import convolved
from benchmarks.rows import interleaved, row
from latentdm.masks import grow_mask

COUNT, SIDE = 8, 512


@cache
def _seconds(grow_mask_by: int, quick: bool) -> dict[str, float]:
    """Medians; at 64 the convolution takes many seconds, and is measured on one or two of the masks."""
    masks = batch(COUNT, SIDE)["mask"].float()
    part = COUNT if grow_mask_by <= 16 else 1 if quick else 2
    assert torch.equal(convolved(masks[:1], grow_mask_by), grow_mask(masks[:1], grow_mask_by))
    ways = {
        "ours": lambda: _median_call(lambda: grow_mask(masks, grow_mask_by), 9),
        "theirs": lambda: _median_call(lambda: convolved(masks[:part], grow_mask_by), 1),
    }
    turns = 5 if part < COUNT else 15 if quick else 45
    seconds = {way: median(times) for way, times in interleaved(ways, turns).items()}
    return {"ours": seconds["ours"], "theirs": seconds["theirs"] * COUNT / part}


def _median_call(function: Callable[[], torch.Tensor], calls: int) -> float:
    """Seconds of a call: a few milliseconds are soon disturbed."""
    return median(interleaved({"": lambda: _drop(function())}, calls)[""])


def _drop(result: torch.Tensor) -> None:
    """A timed function that returns nothing is timed whole."""


def _register(grow_mask_by: int) -> None:
    @row(
        f"grow_mask_{grow_mask_by}", unit="times", versus="the k×k convolution of the original nodes, eight 512² masks"
    )
    def times_faster(quick: bool) -> float:
        seconds = _seconds(grow_mask_by, quick)
        return seconds["theirs"] / seconds["ours"]

    @row(f"grow_mask_{grow_mask_by}_ms", unit="ms", versus="flat in the radius")
    def milliseconds(quick: bool) -> float:
        return 1000 * _seconds(grow_mask_by, quick)["ours"]


for _k in (6, 16, 64):
    _register(_k)
