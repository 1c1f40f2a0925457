"""`PerBatchFinder`: how many images at once go through the autoencoder fastest."""

from collections.abc import Mapping, Sequence
from statistics import median
from time import perf_counter
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from latentdm.batch import LATENTS, MASKED_LATENTS, PIXELS
from latentdm.callbacks.base import EncodeCallback, Inputs
from latentdm.errors import UserError
from latentdm.frozen.chunks import is_out_of_memory
from latentdm.tensors import dtype_name
from latentdm.validation import Check

MIN_SPEEDUP = 1.03
"""A larger ``per_batch`` must be faster by this factor, as the smaller one takes less memory."""

MAX_SLOWDOWN = 1.5
"""What is slower than the fastest by this factor in the first round is not measured again."""


class PerBatchFinder(EncodeCallback):
    """Sets the encoder's ``per_batch`` to the fastest that fits in memory, before a fit encodes its first batch.

    When the first batch has arrived, sanity check included, 1, 2, 4, 8… images of its size and all of its images go
    through the autoencoder at once, in its dtype, in interleaved rounds after one to warm up; medians decide. What runs
    out of memory, and all that is larger, is left out. On a GPU room is kept for gradients and two moments of every
    trained parameter, which may not be there yet. All ranks measure, as they will encode together, and take rank 0's
    choice. The table that was measured is logged.

    The result of encoding does not depend on ``per_batch`` beyond the arithmetic of the batch shape.

    Args:
        candidates: numbers of images to try; None takes the powers of two and the whole batch.
        rounds: measurements of each.
        max_seconds: no new round starts after this time; the first one is always measured.

    Raises:
        UserError: a value out of range; in the run, not even the smallest candidate fits in memory.

    Example:
        >>> Trainer(callbacks=[PerBatchFinder()]).fit(model, datamodule=dm)  # doctest: +SKIP

    Attributes:
        table: what was measured: ``per_batch`` → median seconds an image.
    """

    def __init__(self, candidates: Sequence[int] | None = None, rounds: int = 3, max_seconds: float = 60.0) -> None:
        check = Check("PerBatchFinder")
        if candidates is not None and not (isinstance(candidates, Sequence) and candidates):
            raise check.fail("candidates", "a list of integers of at least 1", candidates)
        self.candidates = candidates and [check.integer("candidates", candidate, 1) for candidate in candidates]
        self.rounds = check.integer("rounds", rounds, 1)
        self.max_seconds = check.number("max_seconds", max_seconds, 0.001)
        self.table: dict[int, float] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget earlier fits."""
        self.table = {}

    def on_encode_start(self, trainer: Trainer, pl_module: LightningModule, inputs: Inputs) -> None:
        """Measure, once a fit.

        Raises:
            UserError: not even the smallest candidate fits in memory.
        """
        if self.table or trainer.state.fn != TrainerFn.FITTING:
            return
        encoder = self.encoder_of(trainer)
        vae = encoder.vae
        views = sum(key in (LATENTS, MASKED_LATENTS) for key in encoder.channels)
        shape = (3, *encoder.crop(inputs[PIXELS]).shape[2:])
        self.table = self._measure(vae, self._choices(views * len(inputs[PIXELS])), shape, _reserve(pl_module))
        encoder.per_batch = trainer.strategy.broadcast(fastest(self.table))
        rank_zero_info(self._text(shape, vae, encoder.per_batch))

    def _choices(self, images: int) -> list[int]:
        if self.candidates is not None:
            return sorted(set(self.candidates))
        return [2**power for power in range(images.bit_length()) if 2**power < images] + [images]

    def _measure(self, vae: Any, choices: list[int], shape: Sequence[int], reserve: int) -> dict[int, float]:
        """``per_batch`` → median seconds an image, of those that fit."""
        gray = torch.full((1, *shape), 0.5, device=vae.device)
        smallest, seconds = choices[0], dict[int, list[float]]()
        began = perf_counter()
        for turn in range(self.rounds + 1):
            if turn > 1 and perf_counter() - began > self.max_seconds:
                break
            for choice in list(choices):
                took = _seconds(vae, gray.expand(choice, *gray.shape[1:]), reserve)
                if took is None:  # nor will more of them fit
                    choices = [smaller for smaller in choices if smaller < choice]
                    break
                if turn:  # the first round warms up
                    seconds.setdefault(choice, []).append(took / choice)
            if not choices:
                raise UserError(
                    f"PerBatchFinder: not even {smallest} of {'×'.join(map(str, shape[1:]))} fits in the memory of "
                    f"{vae.device}; use smaller images, or an autoencoder in fewer bits (vae.dtype=bfloat16)"
                )
            if turn == 1:
                best = min(seconds[choice][0] for choice in choices)
                choices = [choice for choice in choices if seconds[choice][0] <= best * MAX_SLOWDOWN]
        if vae.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(vae.device)
        return {choice: median(times) for choice, times in sorted(seconds.items())}

    def _text(self, shape: Sequence[int], vae: Any, choice: int) -> str:
        lines = [
            f"PerBatchFinder: images of {'×'.join(map(str, shape[1:]))} in {dtype_name(vae.dtype)} on {vae.device}"
        ]
        lines += [
            f"  per_batch {n:>4}: {1000 * seconds:8.1f} ms an image{'   <- taken' if n == choice else ''}"
            for n, seconds in self.table.items()
        ]
        return "\n".join(lines)


def fastest(table: Mapping[int, float]) -> int:
    """The smallest ``per_batch`` that is within 3 % of the fastest; of ``per_batch`` → seconds an image."""
    limit = min(table.values()) * MIN_SPEEDUP
    return min(choice for choice, seconds in table.items() if seconds <= limit)


def _seconds(vae: Any, images: Tensor, reserve: int) -> float | None:
    """How long one pass takes; None where it does not fit beside ``reserve`` bytes."""
    on_gpu = images.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(images.device)
        torch.cuda.synchronize(images.device)
    began, took = perf_counter(), None
    try:
        vae.posterior(images)
        if on_gpu:
            torch.cuda.synchronize(images.device)
        took = perf_counter() - began
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    if on_gpu and took is None:  # outside of the handler, whose traceback would keep the tensors alive
        torch.cuda.empty_cache()
    if on_gpu and took is not None:
        total = torch.cuda.get_device_properties(images.device).total_memory
        if torch.cuda.max_memory_allocated(images.device) + reserve > total:
            return None
    return took


def _reserve(pl_module: LightningModule) -> int:
    """Bytes of the gradients and of the two moments that Adam keeps."""
    return 3 * sum(p.numel() * p.element_size() for p in pl_module.parameters() if p.requires_grad)
