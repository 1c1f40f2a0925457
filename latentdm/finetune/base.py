"""`FineTune`: what the fine-tunes share: loading, the loss, the optimizer, checkpoints.

Shapes: ``b`` batch, ``z h w`` latents, ``r`` the VAE's factor, ``H W`` pixels.
"""

import inspect
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from latentdm.batch import INDEX, LATENT_MASK, LATENTS, MASKED_LATENTS, sample_ids
from latentdm.draws import Draws
from latentdm.errors import UserError
from latentdm.extras import require
from latentdm.finetune.checks import check_batch, check_text, check_vae
from latentdm.finetune.lora import Lora
from latentdm.finetune.objectives import Objective
from latentdm.finetune.optimizers import OPTIMIZERS, SCHEDULES, make_optimizer
from latentdm.finetune.sampling import sample
from latentdm.finetune.sharding import shard
from latentdm.frozen.weights import DTYPES
from latentdm.pipelines import PipelineSource
from latentdm.progress import training_epoch
from latentdm.validation import Check

FULL_RATE, LORA_RATE = 3e-6, 1e-4
"""Usual learning rates."""
CONDITIONS = (LATENT_MASK, MASKED_LATENTS)
"""What an inpainting model sees besides the noisy latents."""
FACTOR = 8
"""Pixels a latent along one side, in the VAE of every model here."""
HALF_PRECISIONS = {"bf16": torch.bfloat16, "16": torch.float16}
"""How a trainer's precision begins → what it computes in."""


class FineTune(LightningModule):
    """Trains the denoiser of a pipeline, all of it or a LoRA, on what a `latentdm.LatentDataModule` gives.

    What is wrong with the settings or the pipeline is told when it is made, and what does not fit the data module
    before the denoiser is loaded. Noise and times are drawn by the step and the sample's row, so that a resumed run
    goes on as it would have.

    It logs ``train/loss`` and ``val/loss``, mean squared errors, and those inside the mask as ``train/loss_in_mask``
    and ``val/loss_in_mask``. The samples of a validation meet the same noise each time.

    Args:
        pretrained: a pipeline's folder or hub id.
        lora: a LoRA's settings; without a rank all weights are trained.
        learning_rate: of the optimizer, after the warm-up; None is 3e-6 for all weights, at a batch of 4 or so, and
            1e-4 for a LoRA.
        warmup_steps: optimizer steps in which the learning rate rises from 0.
        schedule: ``"constant"``, or ``"cosine"`` or ``"linear"``, which fall to 0 at the trainer's last step.
        optimizer: ``"adamw"``, or ``"adamw_8bit"``, whose state takes a quarter of the memory (bitsandbytes, a GPU).
        weight_decay: of the optimizer.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them: a third more
            time, a fraction of the memory.
        dtype: of the loaded weights: ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"auto"``: float32, and for the
            frozen weights under a LoRA that of the trainer's precision.
        masked_weight: how much more an error inside the mask counts than one outside of it; 1 counts alike, as the
            published models were trained. More learns to fill faster, and less to leave the rest as it is.
        sampling_steps: of `predict_step`.
        guidance_scale: of `predict_step`; at most 1 is without guidance.
        seed: of noise and times.
        revision: of a hub repository.
        variant: of the weights' files, such as ``"fp16"``.

    Raises:
        UserError: a value out of range, or a pipeline without a component that is needed.
        MissingExtraError: a package is not installed.
    """

    component: ClassVar[str]
    """Of the pipeline, which is trained."""
    network_class: ClassVar[str]
    """Its class."""
    lora_targets: ClassVar[Sequence[str]]
    """Where `Lora` puts its adapters unless told."""

    latent_channels: int
    """``z``."""
    text_width: int
    """Channels of the prompt embeddings."""
    conditions: tuple[str, ...]
    """What a batch must hold besides latents and prompt embeddings."""
    pipeline_class: str
    """The pipeline that a full save is loaded with: the source's own, unless a model says otherwise."""
    network: Any
    objective: Objective

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Show the shared settings in the signature of a model that passes them on: Hydra's schemas are made of it."""
        super().__init_subclass__(**kwargs)
        own, shared = (inspect.signature(each).parameters.values() for each in (cls.__init__, FineTune.__init__))
        named = [each for each in own if each.kind is not each.VAR_KEYWORD][1:]
        names = {each.name for each in named}
        inherited = [each for each in shared if each.name not in names | {"self"}]
        cls.__signature__ = inspect.Signature([*named, *inherited])  # type: ignore[attr-defined]

    def __init__(
        self,
        pretrained: str,
        lora: Lora | Mapping[str, Any] | None = None,
        learning_rate: float | None = None,
        warmup_steps: int = 0,
        schedule: str = "constant",
        optimizer: str = "adamw",
        weight_decay: float = 0.01,
        gradient_checkpointing: bool = False,
        dtype: str = "auto",
        masked_weight: float = 1.0,
        sampling_steps: int = 30,
        guidance_scale: float = 7.5,
        seed: int = 0,
        revision: str | None = None,
        variant: str | None = None,
    ) -> None:
        super().__init__()
        self.owner = type(self).__name__
        check = Check(self.owner)
        self.lora = lora if isinstance(lora, Lora) else Lora(**dict(lora or {}))
        if learning_rate is None:
            learning_rate = LORA_RATE if self.lora.active else FULL_RATE
        self.learning_rate = check.number("learning_rate", learning_rate, 0)
        self.warmup_steps = check.integer("warmup_steps", warmup_steps, 0)
        self.schedule = check.choice("schedule", schedule, SCHEDULES)
        self.optimizer = check.choice("optimizer", optimizer, OPTIMIZERS)
        if optimizer == "adamw_8bit":
            require("bitsandbytes", None, f"{self.owner}: optimizer=adamw_8bit (unlike adamw)")
        self.weight_decay = check.number("weight_decay", weight_decay, 0)
        self.gradient_checkpointing = gradient_checkpointing
        self.weights_dtype = check.choice("dtype", dtype, DTYPES)
        self.masked_weight = check.number("masked_weight", masked_weight, 0)
        self.sampling_steps = check.integer("sampling_steps", sampling_steps, 1)
        self.guidance_scale = check.number("guidance_scale", guidance_scale, 0)
        self.seed = check.integer("seed", seed, 0)
        require("transformers", "finetune", self.owner)
        self.pipeline = PipelineSource(self.owner, pretrained, revision, variant)
        self.pipeline_class = self.pipeline.pipeline_class
        self.config = dict(self._read_config())
        self.save_hyperparameters(
            {
                "pretrained": str(pretrained),
                "learning_rate": self.learning_rate,
                "lora_rank": self.lora.rank,
                "lora_alpha": self.lora.alpha,
                "optimizer": optimizer,
            }
        )
        self.strict_loading = not self.lora.active  # a LoRA's checkpoint holds the adapter alone
        self.network = None

    def _read_config(self) -> Mapping[str, Any]:
        """The denoiser's config; that all parts of the pipeline are there is looked at on the way."""
        classes = {name: self.pipeline.class_name(name) for name in (self.component, "scheduler", "vae")}
        if classes[self.component] != self.network_class:
            raise UserError(
                f"{self.owner}: the {self.component} of {self.pipeline.source!r} is a {classes[self.component]}, not a "
                f"{self.network_class}; choose the model of its family: model=stable_diffusion, sdxl or flux_fill"
            )
        return self.pipeline.config(self.component)

    # ---------------------------------------------------------------- what fits

    def check(self, datamodule: Any) -> None:
        """Compare what a data module gives with what the denoiser takes, before that is loaded.

        Args:
            datamodule: a `latentdm.LatentDataModule`; one without its ``channels`` is passed over.

        Raises:
            UserError: they do not fit; the text says which setting makes them.
        """
        check_text(self, datamodule)
        channels = getattr(datamodule, "channels", None)
        if isinstance(channels, Mapping) and LATENTS in channels:
            check_vae(self, channels, datamodule.encoder.vae.module)
            self.check_conditions(channels)

    @abstractmethod
    def check_conditions(self, channels: Mapping[str, int]) -> None:
        """Raise UserError unless the denoiser takes conditions of so many channels beside the latents."""

    # ---------------------------------------------------------------- loading

    def configure_model(self) -> None:
        """Load the denoiser, once; add the adapter of a LoRA; under ModelParallelStrategy split it over the ranks."""
        if self.network is not None:
            return
        import diffusers

        trainer: Any = None
        with suppress(RuntimeError):  # made by hand, as in a notebook
            trainer = self.trainer
        self.check(getattr(trainer, "datamodule", None))
        with torch.device("cpu"):  # the strategy moves it; on a GPU a whole model of random weights would come first
            network = self.pipeline.load(
                diffusers, self.component, torch_dtype=self._loading_dtype(str(getattr(trainer, "precision", "")))
            )
            self._adapt(network)
            if self.gradient_checkpointing:
                network.enable_gradient_checkpointing()
            network.train()
            if self.lora.active:
                self.lora.add_to(network, self.lora_targets, self.owner)
        if self.device_mesh is not None:
            shard(network, self.device_mesh, self.owner)
        self.network = network

    def _adapt(self, network: Any) -> None:
        """Change the loaded denoiser before an adapter is added."""

    def _loading_dtype(self, precision: str) -> torch.dtype:
        wanted = DTYPES[self.weights_dtype]
        if wanted is not None or not self.lora.active:
            return wanted or torch.float32
        return HALF_PRECISIONS.get(precision.partition("-")[0], torch.float32)

    # ---------------------------------------------------------------- the loss

    @abstractmethod
    def network_input(self, batch: Mapping[str, Any], noisy: Tensor, times: Tensor) -> dict[str, Any]:
        """The denoiser's arguments, as the pipeline passes them.

        Args:
            batch: of the data module.
            noisy: ``b z h w``.
            times: ``b``, of the objective.
        """

    def predict(self, batch: Mapping[str, Any], noisy: Tensor, times: Tensor) -> Tensor:
        """What the denoiser predicts, ``b z h w``."""
        predicted = self.network(**self.network_input(batch, noisy, times), return_dict=False)[0]
        return self.unpacked(predicted, *noisy.shape[-2:])

    def unpacked(self, output: Tensor, h: int, w: int) -> Tensor:
        """Latents ``b z h w`` of what the denoiser, or the pipeline around it, gives."""
        return output

    def losses(self, batch: Mapping[str, Any], draws: Draws) -> dict[str, Tensor]:
        """``loss`` and, with a mask, ``loss_in_mask``: means over a batch.

        Args:
            batch: ``latents`` ``b z h w``, ``prompt_embeds`` and what the denoiser takes.
            draws: of the batch's rows.
        """
        check_batch(self, batch)
        latents: Tensor = batch[LATENTS]
        noise = draws.normal("noise", latents.shape[1:], latents.device)
        uniform = draws.uniform("time", 1)[:, 0].to(latents.device)
        times = self.objective.times(uniform, latents.shape[-2] * latents.shape[-1] // 4)
        noisy = self.objective.mix(latents, noise, times).to(latents.dtype)
        error = self.predict(batch, noisy, times).float() - self.objective.target(latents, noise, times)
        error = error.square().mean(dim=1, keepdim=True)
        weights = self.objective.weights(times).view(-1, 1, 1, 1)
        if LATENT_MASK not in batch:
            return {"loss": (error * weights).mean()}
        mask = batch[LATENT_MASK].float().mean(dim=1, keepdim=True)  # FLUX's 64 channels are the pixels of a latent
        emphasis = 1 + (self.masked_weight - 1) * mask
        return {
            "loss": (error * emphasis * weights).mean() / emphasis.mean(),
            "loss_in_mask": (error * mask).sum().detach() / mask.sum().clamp(min=1e-6),
        }

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """The loss of a batch."""
        return self._logged("train", batch, batch_idx, training_epoch(self.trainer), prog_bar=True)

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """The same, with the same noise and times in each validation."""
        self._logged("val", batch, batch_idx, 0, sync_dist=True)

    def _logged(self, stage: str, batch: Mapping[str, Any], batch_idx: int, epoch: int, **settings: Any) -> Tensor:
        rows = range(len(batch[LATENTS]) if LATENTS in batch else 0)
        of_rank = [f"{self.global_rank}.{row}" for row in rows]
        ids = sample_ids(batch[INDEX], len(rows)) if rows and INDEX in batch else of_rank
        # with the step, for data sets that repeat their few pictures within an epoch
        draws = Draws(self.seed, epoch, [f"{stage}{batch_idx}.{i}" for i in ids])
        losses = self.losses(batch, draws)
        for name, loss in losses.items():
            self.log(f"{stage}/{name}", loss, batch_size=len(rows), **settings)
        return losses["loss"]

    # ---------------------------------------------------------------- samples

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Sample with diffusers' own pipeline, as a user of the result will.

        Args:
            batch: of the data module.
            batch_idx: keys the noise, the same in every validation.

        Returns:
            ``b 3 H W`` float32 in 0…1.

        Raises:
            UserError: no `latentdm.LatentDataModule` is there, whose autoencoder decodes.
        """
        return sample(self, batch, batch_idx)

    @abstractmethod
    def sampler(self, **parts: Any) -> Any:
        """The pipeline that samples, made of its parts; it is given embeddings, and has no text encoder."""

    @abstractmethod
    def sampler_input(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Its arguments beside the size, the steps and the generators."""

    # ---------------------------------------------------------------- training

    def configure_optimizers(self) -> Any:
        """AdamW over what is trained, with its learning rate's schedule."""
        return make_optimizer(self)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Of a LoRA keep the adapter alone: the rest lies in the pipeline as it was."""
        if not self.lora.active or "averaging_state" in checkpoint:  # Lightning's averages need every weight
            return
        trained = {name for name, weight in self.named_parameters() if weight.requires_grad}
        checkpoint["state_dict"] = {
            name: weight for name, weight in checkpoint["state_dict"].items() if name in trained
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that lacks the adapter, which would leave it as it was made."""
        trained = {name for name, weight in self.named_parameters() if weight.requires_grad}
        missing = sorted(trained - checkpoint["state_dict"].keys())
        if missing:
            raise UserError(
                f"{self.owner}: the checkpoint lacks {len(missing)} of the weights that are trained, the first "
                f"{missing[0]!r}; resume with the LoRA settings that it was written with"
            )
