"""LightningModules that fine-tune Stable Diffusion and FLUX Fill, and the callback that saves for diffusers."""

from latentdm.finetune.flux_fill import FluxFill
from latentdm.finetune.lora import Lora
from latentdm.finetune.saving import SaveForDiffusers
from latentdm.finetune.stable_diffusion import StableDiffusion

__all__ = ["FluxFill", "Lora", "SaveForDiffusers", "StableDiffusion"]
