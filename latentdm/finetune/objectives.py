"""What a model learns at a time between image and noise.

Shapes: ``b`` batch, ``z h w`` latents.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from math import exp
from typing import Any

import torch
from torch import Tensor

from latentdm.errors import UserError

PREDICTIONS = ("epsilon", "v_prediction", "sample")
TIMES = ("uniform", "logit_normal")


class Objective(ABC):
    """Mixes latents with noise, and says what the model is to predict of it."""

    @abstractmethod
    def times(self, uniform: Tensor, tokens: int) -> Tensor:
        """Times ``b`` from uniform numbers ``b`` in 0…1, for images of so many packed tokens."""

    @abstractmethod
    def mix(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Noisy latents ``b z h w``, float32."""

    @abstractmethod
    def target(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """What the model is to predict, ``b z h w``, float32."""

    def weights(self, times: Tensor) -> Tensor:
        """What each sample's loss is multiplied by, ``b``."""
        return torch.ones_like(times, dtype=torch.float32)


class Diffusion(Objective):
    """The discrete noise schedule of Stable Diffusion, as the pipeline's scheduler has it. Times are its timesteps.

    Args:
        scheduler: the scheduler's config; its ``prediction_type`` is what the model predicts.
        snr_gamma: weighs samples by min(SNR, gamma) (min-SNR, https://arxiv.org/abs/2303.09556); None by nothing.
        owner: the class that an error names.

    Raises:
        UserError: the scheduler is no such one.
    """

    def __init__(self, scheduler: Mapping[str, Any], snr_gamma: float | None, owner: str) -> None:
        from diffusers import DDPMScheduler

        self.prediction = scheduler.get("prediction_type", "epsilon")
        if "beta_schedule" not in scheduler or self.prediction not in PREDICTIONS:
            raise UserError(
                f"{owner}: the pipeline's scheduler is a {scheduler.get('_class_name')} (prediction_type "
                f"{self.prediction!r}); Stable Diffusion has one with betas that predicts {', '.join(PREDICTIONS)}"
            )
        self.scheduler = DDPMScheduler.from_config(dict(scheduler))
        self.snr_gamma = snr_gamma

    def times(self, uniform: Tensor, tokens: int) -> Tensor:
        """Each timestep equally often."""
        steps: int = self.scheduler.config.num_train_timesteps
        return (uniform * steps).long().clamp(max=steps - 1)

    def mix(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """By the scheduler."""
        mixed: Tensor = self.scheduler.add_noise(latents.float(), noise, times)
        return mixed

    def target(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Noise, velocity or the latents themselves."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "sample":
            return latents.float()
        velocity: Tensor = self.scheduler.get_velocity(latents.float(), noise, times)
        return velocity

    def weights(self, times: Tensor) -> Tensor:
        """Min-SNR's, for what is predicted."""
        if self.snr_gamma is None:
            return super().weights(times)
        signal: Tensor = self.scheduler.alphas_cumprod.to(times.device)[times].float()
        snr: Tensor = signal / (1 - signal)
        if self.prediction == "epsilon":
            return (self.snr_gamma / snr).clamp(max=1)  # a signal of 0 gives 1
        return snr.clamp(max=self.snr_gamma) / (snr + 1 if self.prediction == "v_prediction" else 1)


class FlowMatching(Objective):
    """Straight lines from image to noise, as FLUX has them. Times are sigmas in 0…1.

    Args:
        scheduler: the scheduler's config. With ``use_dynamic_shifting`` larger images get more noise, as in sampling.
        density: ``"uniform"``, or ``"logit_normal"``, which meets the middle of the way more often.
        owner: the class that an error names.

    Raises:
        UserError: the scheduler is no such one.
    """

    def __init__(self, scheduler: Mapping[str, Any], density: str, owner: str) -> None:
        if "FlowMatch" not in str(scheduler.get("_class_name")):
            raise UserError(
                f"{owner}: the pipeline's scheduler is a {scheduler.get('_class_name')}; FLUX has a "
                "FlowMatchEulerDiscreteScheduler"
            )
        self.config = scheduler
        self.density = density

    def times(self, uniform: Tensor, tokens: int) -> Tensor:
        """Drawn by the density, then shifted towards noise by the number of tokens."""
        times = uniform.clamp(1e-5, 1 - 1e-5)
        if self.density == "logit_normal":
            times = torch.sigmoid(torch.special.ndtri(times))
        shift = exp(self.mu(tokens)) if self.config.get("use_dynamic_shifting") else self.config.get("shift", 1.0)
        return shift * times / (1 + (shift - 1) * times)

    def mu(self, tokens: int) -> float:
        """The logarithm of the shift: linear in the number of tokens, as the pipelines compute it."""
        low, high = self.config.get("base_image_seq_len", 256), self.config.get("max_image_seq_len", 4096)
        first, last = self.config.get("base_shift", 0.5), self.config.get("max_shift", 1.15)
        return float(first + (last - first) * (tokens - low) / (high - low))

    def mix(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """(1 − σ)·latents + σ·noise."""
        sigma = times.float().view(-1, 1, 1, 1)
        return (1 - sigma) * latents.float() + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """The direction of the line."""
        return noise - latents.float()
