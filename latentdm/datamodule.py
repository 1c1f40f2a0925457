"""`LatentDataModule`: any data module of pixel batches, turned into one of latents inside the batch-transfer hooks."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn

from latentdm import hooks
from latentdm.batch import EPOCH, PIXELS, BatchKeys, Key, Path
from latentdm.cache.cache import Cache
from latentdm.containers import is_batch
from latentdm.data.module import PixelDataModule
from latentdm.draws import Draws
from latentdm.encoders.base import Encoder
from latentdm.errors import UserTypeError
from latentdm.passage import Passage
from latentdm.shown import one_line
from latentdm.stages import Line, Stage
from latentdm.validation import Check
from latentdm.wrapper import Wrapper


class LatentDataModule(Wrapper):
    """Wraps a data module of pixel batches; its own hooks, loaders and state go on working behind it.

    Each batch passes a line of `latentdm.Stage`s: on the host captions and tokenizers, on the device augmentation,
    masks, the encoder, the text encoder and then ``stages``; last a cast to the trainer's input dtype. Images should be
    uint8: they cross to the device at a quarter of the bytes, and no precision plugin rounds them. Attributes that this
    class lacks are looked up on ``pixels``.

    Args:
        pixels: any LightningDataModule whose batches (dicts, tuples, lists or dataclasses) hold images; where they
            hold such batches, as those of several training loaders do, each of these is encoded in its place.
        encoder: makes the latents.
        masks: where masks come from; None takes the batch's own. Asked only where a stage reads a mask.
        augment: changes images and what lies on them on the device, in training alone, before masks are made.
        captions: changes the batch's captions on the host; it draws in training alone.
        text: turns captions into prompt embeddings, on the device; its tokenizer runs on the host.
        stages: your own, which run last and still see the pixels: a depth map for a ControlNet, features of another
            frozen network. Those with ``on_host`` run on the host.
        cache: keeps what was encoded; None: nothing is kept.
        keys: our name → the user's, for inputs and outputs: a key of a dict batch or a position in a tuple batch;
            None keeps an output out of the batch.
        layout: ``"CHW"``, or ``"HWC"`` for channels-last images.
        pixel_range: of float images, black and white: ``(0, 1)`` or ``(-1, 1)``.
        keep_pixels: leave the cropped ``pixels`` (``b c h w``) in the batch.
        seed: of everything random, together with epoch, ``index`` and purpose. Batches without ``index`` are keyed on
            rank, batch and row instead. Validation, test and predict draw as in epoch 0, so that figures compare.

    Raises:
        UserError: a value out of range.
        UserTypeError: ``pixels``, ``encoder`` or a stage is of another kind.

    Example:
        >>> dm = LatentDataModule(pixels, InpaintEncoder(vae), keys={"latents": "samples"})  # doctest: +SKIP
        >>> Trainer().fit(model, datamodule=dm)  # doctest: +SKIP
    """

    def __init__(
        self,
        pixels: LightningDataModule,
        encoder: Encoder,
        *,
        masks: Stage | None = None,
        augment: Stage | None = None,
        captions: Stage | None = None,
        text: Stage | None = None,
        stages: Sequence[Stage] = (),
        cache: Cache | None = None,
        keys: Mapping[str, Key | None] | None = None,
        layout: str = "CHW",
        pixel_range: Sequence[float] = (0, 1),
        keep_pixels: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(pixels)
        if not isinstance(encoder, Encoder):
            raise UserTypeError(
                f"LatentDataModule: encoder must be an Encoder, got {type(encoder).__name__}; make one, as with "
                "PlainEncoder(vae) or InpaintEncoder(vae)"
            )
        self.encoder = encoder
        self.masks = masks
        self.augment = augment
        self.captions = captions
        self.text = text
        self.stages = list(stages)
        self.keep_pixels = keep_pixels
        self.seed = seed
        self.cache = cache
        encoder.cache = cache
        steps: dict[str, Any] = {"masks": masks, "augment": augment, "text": text, "stages": stages}
        steps = steps if cache is None else cache.stages(**steps)
        self.line = Line.arrange(encoder, captions=captions, **steps)
        self.keys = BatchKeys(keys, layout, pixel_range, self.line.names)
        self._batch_draws = hooks.BatchDraws()
        self._warned = False
        self._is_example = False
        self._passage = Passage(self.line, self.keys, self._draws)

    def __repr__(self) -> str:
        keys = self.keys.keys | dict.fromkeys(self.keys.left_out)
        pixel_range = [-1 if self.keys.signed else 0, 1]
        return one_line(self, keys=keys, layout=self.keys.layout, pixel_range=pixel_range)

    @property
    def channels(self) -> dict[str, int]:
        """Our name → channels, of all at latent resolution, for a model to fit itself to; known from `setup` on."""
        return self.line.channels

    def check(self) -> None:
        """Look whether the data bring what the stages read, before anything large is loaded.

        Sets ``pixels`` up and reads a sample, where they are a module of `latentdm.data` that reads samples by
        position, and prepares nothing of its own. What others bring is told in `setup`, or at the first batch.

        Raises:
            UserError: something is missing; naming the stage and the remedies.
        """
        prepares = getattr(self.pixels.prepare_data, "__module__", "").partition(".")[0]
        if isinstance(self.pixels, PixelDataModule) and prepares in ("latentdm", "lightning"):
            self.pixels.setup("fit")
            self._check_sample()

    def _check_sample(self) -> None:
        if not hooks.has_own(self, hooks.HOOKS, LatentDataModule):  # which may add what samples lack
            hooks.check_sample(self)

    def setup(self, stage: str) -> None:
        """Delegates; makes the frozen networks and puts them on this rank's device.

        Raises:
            UserError: the model goes past the hooks, or the data lack what a stage reads: see `check`.
        """
        if hasattr(self.pixels, "masks_unused"):  # our own data modules say it when they are set up
            self.pixels.masks_unused = hooks.unused_masks(self.line.device, self.keys.keys)
        self.pixels.setup(stage)
        self._check_sample()
        if self.trainer is not None:
            hooks.check_model(self.trainer.lightning_module)
            self.line.setup(self.trainer.strategy.root_device)
        if self.cache is not None and self.trainer is not None:
            self.cache.setup(self)

    def teardown(self, stage: str) -> None:
        """Delegates; then frees the device of the frozen networks, as Lightning frees it of the model."""
        self.pixels.teardown(stage)
        if self.cache is not None:
            self.cache.flush()
        if self.trainer is not None:
            self.line.setup("cpu")

    # ---------------------------------------------------------------- the way of a batch

    def process(self, batch: Any, device: torch.device | str, training: bool = False, epoch: int = 0) -> Any:
        """The way of one batch by hand, as in a notebook or a loop of your own.

        Args:
            batch: as a loader yields it.
            device: where to encode.
            training: draw as training does: stages that are for training alone run, such as augmentation, and captions
                are dropped or shuffled.
            epoch: on which draws are keyed where the batch does not say it; those of `latentdm.data` do.

        Returns:
            As a training step would receive it, in float32 where there is no trainer.

        Raises:
            UserError: the epoch is negative; or see `on_after_batch_transfer`.
        """
        with self._batch_draws.by_hand(training, Check("LatentDataModule").integer("epoch", epoch, 0)):
            return self.on_after_batch_transfer(self._transferred(batch, device), 0)

    def encode(self, batch: Any, device: torch.device | str) -> tuple[dict[str, Any], dict[str, Any]]:
        """As `process`, before anything is renamed, dropped or cast.

        Returns:
            Under our names: what the encoder was given (``pixels``, the ``mask`` that was made, …), and all that the
            stages wrote, in float32. Of a batch with several parts that hold images, those of the first.
        """
        encoded: list[tuple[dict[str, Any], dict[str, Any]]] = []

        def run(part: Any, path: Path) -> Any:
            if not encoded:
                encoded.append(self._passage.run(part, path, self.trainer))
            return part

        self.keys.each(self.pixels.on_after_batch_transfer(self._transferred(batch, device), 0), run, (0,))
        return encoded[0]

    def _transferred(self, batch: Any, device: torch.device | str) -> Any:
        self.line.setup(device)
        return self.transfer_batch_to_device(self.on_before_batch_transfer(batch, 0), torch.device(device), 0)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """On the host: settles the samples' draws, so that none waits for the device, and runs the host's stages."""
        self._is_example = self.trainer is not None and hooks.is_example_input(batch, self.trainer)
        self._passage.begin()
        if self._is_example:
            return batch
        batch = self.pixels.on_before_batch_transfer(batch, dataloader_idx)
        return self.keys.each(batch, self._passage.prepare, (dataloader_idx,))

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Delegates; Lightning's own copies pinned memory without blocking."""
        self._passage.move(device)
        if self._is_example:
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        batch = self.keys.each(batch, lambda part, path: hooks.movable(part, self.pixels))
        return self.pixels.transfer_batch_to_device(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """On the device: pixels → latents.

        Args:
            batch: holds ``pixels`` ``b c H W`` and what the stages read. What holds no images and is no dict, tuple,
                list or dataclass passes unchanged, as does the model's ``example_input_array``.
            dataloader_idx: Lightning's.

        Returns:
            The batch with the stages' keys instead of pixels and mask, in the trainer's input dtype.

        Raises:
            UserError: naming the key, its shape and dtype, and what was expected.
        """
        if self._is_example:
            self._is_example = False
            return batch
        batch = self.pixels.on_after_batch_transfer(batch, dataloader_idx)
        if not is_batch(batch):
            hooks.check_bare(batch, self.keys, self.encoder.vae.spatial_compression)
            return batch
        return self.keys.each(batch, self._encoded, (dataloader_idx,))

    def _encoded(self, batch: Any, path: Path) -> Any:
        """A part as the step receives it."""
        trainer, drops = self.trainer, self.line.drops
        inputs, outputs = self._passage.run(batch, path, trainer)
        results = {name: value for name, value in outputs.items() if name not in drops}
        if self.keep_pixels:
            results[PIXELS] = self.encoder.crop(inputs[PIXELS])
        batch = self.keys.write(batch, results, drop=(*drops, EPOCH))
        if trainer is not None:
            batch = trainer.precision_plugin.convert_input(batch)
            hooks.notify(trainer, "on_encode_end", inputs, outputs, batch)
        return batch

    def _draws(self, found: Mapping[str, Any], path: Path) -> Draws | None:
        """The draws of a part's samples, which is where it is first looked at."""
        trainer = self.trainer
        if trainer is not None and not self._warned and (lost := hooks.rounded_pixels(found, trainer)) is not None:
            self._warned = True
            rank_zero_warn(f"LatentDataModule: {lost}")
        return self._batch_draws(found, self.seed, trainer, path)
