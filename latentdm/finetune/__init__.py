"""LightningModules that fine-tune Stable Diffusion and FLUX Fill, and the callback that saves for diffusers."""
