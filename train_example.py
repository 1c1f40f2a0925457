"""Fine-tune a small inpainting model on photographs, with latents that come ready-made from the data module.

Run ``python train_example.py``, or with any override of the groups under ``conf/``.
"""

from collections import defaultdict
from typing import Any

import hydra
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from hydra.utils import instantiate
from lightning import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Timer
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor

from latentdm.cache.rows import is_blank
from latentdm.callbacks import EncodeCallback, EncodeMonitor, SamplePreview
from latentdm.callbacks.base import Inputs, Outputs
from latentdm.errors import plain_errors
from latentdm.finetune.base import FineTune


class LatentDiffusion(LightningModule):
    """Predicts the velocity of noisy latents; with an inpainting encoder it also sees the mask and the masked image."""

    def __init__(
        self,
        block_out_channels: list[int],
        layers_per_block: int,
        learning_rate: float,
        warmup_steps: int = 0,
        noises: int = 1,
        sampling_steps: int = 1,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        # At the last time nothing of the image is left, as where sampling begins.
        self.scheduler = DDPMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
        )
        self.unet: UNet2DModel | None = None

    def configure_model(self) -> None:
        if self.unet is not None:
            return
        channels: dict[str, int] = self.trainer.datamodule.channels  # latents 4, latent_mask 1, masked_latents 4
        blocks = len(self.hparams.block_out_channels)
        self.unet = UNet2DModel(
            in_channels=sum(channels.values()),
            out_channels=channels["latents"],
            block_out_channels=tuple(self.hparams.block_out_channels),
            layers_per_block=self.hparams.layers_per_block,
            down_block_types=("DownBlock2D",) * blocks,
            up_block_types=("UpBlock2D",) * blocks,
            norm_num_groups=16,
        )

    def on_fit_start(self) -> None:
        # One stream a rank: after seed_everything the global generators of all ranks would draw the same noise.
        self.random = torch.Generator(self.device).manual_seed(self.global_rank)

    def velocity(self, batch: dict[str, Any], noisy: Tensor, times: Tensor) -> Tensor:
        conditions = [batch[key] for key in ("latent_mask", "masked_latents") if key in batch]
        return self.unet(torch.cat([noisy, *conditions], dim=1), times).sample

    def loss(self, batch: dict[str, Any], noise: Tensor, times: Tensor) -> Tensor:
        latents = batch["latents"]
        predicted = self.velocity(batch, self.scheduler.add_noise(latents, noise, times), times)
        return F.mse_loss(predicted.float(), self.scheduler.get_velocity(latents, noise, times).float())

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        # Encoding costs more than this small UNet does, so each image may meet several noises and times.
        keys = [key for key in ("latents", "latent_mask", "masked_latents") if key in batch]
        batch = {key: batch[key].repeat_interleave(self.hparams.noises, dim=0) for key in keys}
        latents = batch["latents"]
        noise = torch.empty_like(latents).normal_(generator=self.random)
        count = self.scheduler.config.num_train_timesteps
        times = torch.randint(count, (len(latents),), generator=self.random, device=latents.device)
        loss = self.loss(batch, noise, times)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(latents))
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        # The same noise and times each time, so that two validation losses can be compared.
        latents = batch["latents"]
        fixed = torch.Generator(latents.device).manual_seed(batch_idx)
        noise = torch.empty_like(latents).normal_(generator=fixed)
        last = self.scheduler.config.num_train_timesteps - 1
        times = torch.arange(len(latents), device=latents.device) * last // max(len(latents) - 1, 1)
        self.log("val/loss", self.loss(batch, noise, times), batch_size=len(latents), sync_dist=True)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Latents sampled from noise, for what the batch shows of its images."""
        scheduler = DDIMScheduler.from_config(self.scheduler.config, clip_sample=False, timestep_spacing="trailing")
        scheduler.set_timesteps(self.hparams.sampling_steps)
        fixed = torch.Generator(self.device).manual_seed(batch_idx)
        latents = torch.empty_like(batch["latents"]).normal_(generator=fixed)
        for time in scheduler.timesteps:
            latents = scheduler.step(self.velocity(batch, latents, time), time, latents).prev_sample
        return latents

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.learning_rate)
        steps = self.trainer.estimated_stepping_batches
        schedule = get_cosine_schedule_with_warmup(optimizer, self.hparams.warmup_steps, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class RepairQuality(EncodeCallback):
    """How well holes of validation images are filled, in dB of PSNR inside them: by a model, and by two simple ways.

    All are given the same masked pictures. What the VAE makes of whole pictures is the most that latents can reach.
    """

    def __init__(self) -> None:
        self.measures = False
        self.psnr: dict[str, list[float]] = defaultdict(list)

    def on_encode_end(
        self, trainer: Trainer, pl_module: LightningModule, inputs: Inputs, outputs: Outputs, batch: Any
    ) -> None:
        self.encoded = inputs, outputs

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, loader: int = 0
    ) -> None:
        encoder, (inputs, encoded) = trainer.datamodule.encoder, self.encoded
        if not self.measures or "masked_latents" not in encoded or "source" in inputs or is_blank(inputs):
            return
        pictures = encoder.images(inputs)
        image, shown = pictures["latents"], pictures["masked_latents"]
        hole = ((image - shown).abs() > 1e-3).any(dim=1, keepdim=True)  # b 1 h w; no 8-bit level is so near mid-gray
        area = hole.float().mean((1, 2, 3))
        counted = (area > 0) & (area < 1)  # of a picture that is all hole, the simple ways know nothing
        if not counted.any():
            return
        with trainer.precision_plugin.predict_step_context():
            sampled = pl_module.predict_step(batch, batch_idx)
        image, shown, hole = image[counted], shown[counted], hole[counted]
        kept = (~hole).float()
        ways = {
            "the model": encoder.vae.decode(sampled[counted]),
            "mean colour around them": (image * kept).sum((2, 3), True) / kept.sum((2, 3), True),
            "biharmonic (scikit-image)": torch.stack([biharmonic(*pair) for pair in zip(shown, hole, strict=True)]),
            "the VAE, shown all": encoder.vae.decode(encoded["latents"][counted]),
        }
        for way, made in ways.items():
            squares = (made.clamp(0, 1) - image).square().mean(dim=1, keepdim=True) * hole
            self.psnr[way] += (-10 * (squares.sum((1, 2, 3)) / hole.sum((1, 2, 3))).log10()).tolist()


def biharmonic(shown: Tensor, hole: Tensor) -> Tensor:
    """A picture ``3 h w`` in 0…1 with its hole ``1 h w`` filled smoothly from its rim."""
    from skimage.restoration import inpaint_biharmonic

    filled = inpaint_biharmonic(shown.permute(1, 2, 0).cpu().numpy(), hole[0].cpu().numpy(), channel_axis=-1)
    return torch.from_numpy(filled).permute(2, 0, 1).to(shown)


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> None:
    """Hydra's entry point."""
    with plain_errors(cfg):
        train(cfg)


def train(cfg: DictConfig) -> dict[str, float]:
    """Validate, train, validate again, and print a table; returns the first and the last validation loss."""
    seed_everything(cfg.seed, workers=True, verbose=False)
    datamodule = instantiate(cfg.datamodule)
    datamodule.check()  # before anything large is loaded
    model = make_model(cfg.model)
    if isinstance(model, FineTune):
        model.check(datamodule)
    callbacks, loggers = (list(instantiate(cfg.get(group) or {}).values()) for group in ("callbacks", "logger"))
    quality = RepairQuality()
    trainer: Trainer = instantiate(cfg.trainer, callbacks=[*callbacks, quality], logger=loggers)
    first = validation_loss(trainer, model, datamodule)
    trainer.fit(model, datamodule, ckpt_path=cfg.ckpt_path)
    quality.measures = isinstance(model, LatentDiffusion)  # a real model samples for minutes
    last = validation_loss(trainer, model, datamodule)
    if trainer.is_global_zero:
        batches = trainer.global_step * trainer.accumulate_grad_batches * trainer.world_size
        print_summary(trainer, first, last, batches * cfg.pixels.batch_size, quality)
    return {"first": first, "last": last}


def make_model(cfg: DictConfig) -> LightningModule:
    """The model above, or the one that an experiment names."""
    return instantiate(cfg) if "_target_" in cfg else LatentDiffusion(**OmegaConf.to_container(cfg))


def validation_loss(trainer: Trainer, model: LightningModule, datamodule: LightningDataModule) -> float:
    """NaN where validation is switched off."""
    results = trainer.validate(model, datamodule, verbose=False)
    return results[0]["val/loss"] if results else float("nan")


def print_summary(trainer: Trainer, first: float, last: float, images: int, quality: RepairQuality) -> None:
    """The run in a few lines."""
    rows = {
        "images": f"{images}",
        "steps": f"{trainer.global_step}",
        "first validation loss": f"{first:.4f}",
        "last validation loss": f"{last:.4f} ({last / first:.0%} of the first)",
    }
    cache = trainer.datamodule.cache
    if cache is not None:
        rows["cache"] = f"{cache.hits} hits, {cache.misses} misses, {cache.failures} failures"
    for callback in trainer.callbacks:
        if isinstance(callback, Timer):
            rows["images/s"] = f"{images / callback.time_elapsed('train'):.1f}"
        elif isinstance(callback, EncodeMonitor) and callback.totals.batches:  # it leaves the first batch out
            rows["share of the step spent encoding"] = f"{callback.totals.share_of_step_pct:.0f}%"
        elif isinstance(callback, SamplePreview):
            rows["before and after"] = str(callback.latest)
    for way, values in quality.psnr.items():
        rows[f"PSNR in {len(values)} holes, {way}"] = f"{sum(values) / len(values):.1f} dB"
    rows["outputs"] = str(trainer.default_root_dir)
    table = Table("", Column(overflow="fold"), title="latentdm example", show_header=False)
    for row in rows.items():
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
