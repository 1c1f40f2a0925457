"""`LatentStats`: how latents and masks are distributed, and an alarm where that is wrong.

Shapes: ``b`` batch, ``z`` latent channels, ``n`` batches of a window.
"""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from latentdm.alarms import (
    MASK_RANGE,
    STD_RANGE,
    latent_std_alarm,
    mask_alarm,
    repeated_batches_alarm,
    repeated_ranks_alarm,
)
from latentdm.batch import LATENTS, NOISE_MASK, PIXELS
from latentdm.cache.rows import is_blank
from latentdm.callbacks.base import EncodeCallback, Inputs, LogSteps, Outputs
from latentdm.validation import Check

MIN_BATCHES = 8
"""Batches that an alarm needs; after as many the first alarms ring, whatever the log steps."""


class LatentStats(EncodeCallback):
    """Logs mean and standard deviation of the latents, and warns, once each, of what looks wrong.

    | metric | meaning |
    |---|---|
    | ``latents/mean``, ``latents/std`` | over all channels: the mean, and the root of the channels' mean variance |
    | ``latents/channel_00_mean``, ``latents/channel_00_std``, … | of each channel |
    | ``masks/share_pct`` | share of the image that ``noise_mask`` covers |

    Warnings: a standard deviation far from 1, as with a scaling factor forgotten or applied twice; masks that are
    nearly always empty or full; latents that repeat from batch to batch in an epoch; images that are the same on
    several ranks in the same step.

    Figures are over the training batches since the last log step (eight at least) and are gathered on the device. They
    are checked after eight batches and then at the trainer's log steps. Loggers write rank 0's.

    Args:
        std_range: the lowest and the highest standard deviation without a warning.
        mask_range: a mask that covers less or more of its image counts as empty or full.
        per_channel: log each channel as well.

    Raises:
        UserError: a range is out of order.

    Example:
        >>> Trainer(callbacks=[LatentStats()]).fit(model, datamodule=dm)  # doctest: +SKIP
    """

    def __init__(
        self,
        std_range: Sequence[float] = STD_RANGE,
        mask_range: Sequence[float] = MASK_RANGE,
        per_channel: bool = True,
    ) -> None:
        check, order = Check("LatentStats"), "of at least 0, the second larger"
        self.std_range = check.numbers("std_range", std_range, order, lambda low, high: 0 <= low < high)
        self.mask_range = check.numbers("mask_range", mask_range, order, lambda low, high: 0 <= low < high)
        self.per_channel = per_channel
        self._window = Window()
        self._steps = LogSteps()
        self._checked = False
        self._warned: set[str] = set()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget earlier fits."""
        self._window, self._steps, self._checked, self._warned = Window(), LogSteps(), False, set()

    def on_encode_end(
        self, trainer: Trainer, pl_module: LightningModule, inputs: Inputs, outputs: Outputs, batch: Any
    ) -> None:
        """Add the batch to the figures, on the device."""
        if trainer.training:
            pictures = outputs[LATENTS] if is_blank(inputs) else inputs[PIXELS]
            self._window.add(pictures, outputs[LATENTS], outputs.get(NOISE_MASK), trainer.current_epoch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the figures at log steps, and warn of what looks wrong."""
        logs, enough = self._steps.reached(trainer), self._window.batches >= MIN_BATCHES
        if not self._window.batches or not (logs or (enough and not self._checked)):
            return
        mean, std, shares = self._window.read()
        if logs:
            pl_module.log_dict(self._metrics(mean, std, shares), batch_size=1)
        if not enough:
            return
        self._checked = True
        self._warn("std", latent_std_alarm(overall(std), self.std_range))
        self._warn("masks", mask_alarm(shares, self.mask_range))
        self._warn("batches", repeated_batches_alarm(self._window.repeated()))
        if "ranks" not in self._warned and _ranks_read_their_own(trainer):
            heads = trainer.strategy.all_gather(torch.stack(self._window.heads))
            self._warn("ranks", repeated_ranks_alarm(_repeats_across_ranks(heads)))
        if logs:
            self._window = Window()

    def _metrics(self, mean: Tensor, std: Tensor, shares: Tensor) -> dict[str, float]:
        metrics = {"latents/mean": float(mean.mean()), "latents/std": overall(std)}
        if len(shares):
            metrics["masks/share_pct"] = 100 * float(shares.mean())
        for channel in range(len(mean) if self.per_channel else 0):
            metrics[f"latents/channel_{channel:02d}_mean"] = float(mean[channel])
            metrics[f"latents/channel_{channel:02d}_std"] = float(std[channel])
        return metrics

    def _warn(self, name: str, alarm: str | None) -> None:
        if alarm is not None and name not in self._warned:
            self._warned.add(name)
            rank_zero_warn(f"LatentStats: {alarm}")


class Window:
    """Figures of some batches, on the device until they are read."""

    def __init__(self) -> None:
        self.batches = 0
        self.heads: list[Tensor] = []
        """A fingerprint of each batch's first image."""
        self._moments: list[Tensor] = []
        self._weights: list[int] = []
        self._shares: list[Tensor] = []
        self._prints: list[Tensor] = []
        self._epochs: list[int] = []

    def add(self, pixels: Tensor, latents: Tensor, noise_mask: Tensor | None, epoch: int) -> None:
        """Add a batch: ``b c H W``, ``b z …`` and ``b 1 h w``."""
        self.batches += 1
        by_channel = latents.float().movedim(1, 0).flatten(1)
        variance, mean = torch.var_mean(by_channel, dim=1, correction=0)
        self._moments.append(torch.stack([mean, variance + mean.square()]))
        self._weights.append(by_channel.shape[1])
        if noise_mask is not None:
            self._shares.append(noise_mask.float().flatten(1).mean(1))
        self._prints.append(_fingerprints(latents))
        self._epochs += [epoch] * len(latents)
        self.heads.append(_fingerprints(pixels[:1])[0])

    def read(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and standard deviation ``z`` of the channels, and the share masked of each sample; on the CPU."""
        weights = torch.tensor(self._weights, dtype=torch.float32).view(-1, 1, 1)
        mean, square = (torch.stack(self._moments).cpu() * weights).sum(0) / weights.sum()
        shares = torch.cat(self._shares).cpu() if self._shares else torch.empty(0)
        return mean, (square - mean.square()).clamp_min(0).sqrt(), shares

    def repeated(self) -> float:
        """The share of samples whose latents had been there before, in the same epoch."""
        prints = torch.cat(self._prints).cpu().tolist()
        different = {(epoch, *map(_rounded, pair)) for epoch, pair in zip(self._epochs, prints, strict=True)}
        return 1 - len(different) / len(prints)


def _fingerprints(images: Tensor) -> Tensor:
    """``b 2`` float32: two numbers by which to know a sample again."""
    values = images.float().flatten(1)
    variance, mean = torch.var_mean(values, dim=1)
    return torch.stack([mean, variance], dim=1)


def _rounded(value: float) -> float:
    """Coarse enough to hide the arithmetic of the batch's shape, fine enough to tell samples apart."""
    return round(value, 4)


def _repeats_across_ranks(heads: Tensor) -> float:
    """The share of steps in which some rank's first image was rank 0's as well; ``ranks n 2``."""
    same = (heads[1:] - heads[:1]).abs().amax(-1) < 1e-4
    return float(same.any(0).float().mean())


def _ranks_read_their_own(trainer: Trainer) -> bool:
    """Whether each rank should read samples of its own; those of tensor parallelism read the same."""
    ranks = (trainer.distributed_sampler_kwargs or {}).get("num_replicas", 1)
    return trainer.world_size > 1 and ranks == trainer.world_size


def overall(std: Tensor) -> float:
    """The root of the channels' mean variance, given the standard deviation of each: ``z``."""
    return float(std.square().mean().sqrt())
