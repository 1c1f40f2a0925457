"""`LatentDataModule`: any data module of pixel batches, turned into one of latents inside the batch-transfer hooks."""

from collections.abc import Mapping
from itertools import count
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from latentdm.augment import GEOMETRY, Augment
from latentdm.batch import CAPTION, INDEX, MASK, PIXELS, BatchKeys, Key, crop, describe, is_batch, sample_ids
from latentdm.captions import Captions
from latentdm.draws import Draws
from latentdm.encoders.base import Encoder
from latentdm.errors import UserError, UserTypeError
from latentdm.masks.sources import MaskSource

LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader", "predict_dataloader")
HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
STEPS = ("training_step", "validation_step", "test_step", "predict_step")


class LatentDataModule(LightningDataModule):
    """Wraps a data module of pixel batches; its own hooks, loaders and state go on working behind it.

    In ``on_after_batch_transfer``, on the device, each batch passes mask source → encoder → the trainer's input dtype.
    Images should be uint8: they cross to the device at a quarter of the bytes, and no precision plugin rounds them.
    Attributes that this class lacks are looked up on ``pixels``.

    Args:
        pixels: any LightningDataModule whose batches (dicts, tuples or lists) hold images.
        encoder: makes the latents.
        masks: where masks come from; None takes the batch's own. Asked only by an encoder that needs a mask.
        keys: our name → the user's, for inputs and outputs: a key of a dict batch or a position in a tuple batch;
            None keeps an output out of the batch.
        layout: ``"CHW"``, or ``"HWC"`` for channels-last images.
        keep_pixels: leave the cropped ``pixels`` (``b c h w``) in the batch.
        seed: of everything random, together with epoch, ``index`` and purpose. Batches without ``index`` are keyed on
            rank, batch and place instead. Validation, test and predict draw as in epoch 0, so that figures compare.
        augment: changes images, masks and label maps on the device, in training alone, before masks are made.
        captions: changes the batch's captions on the host; it draws in training alone.

    Raises:
        ValueError: a value out of range.
        TypeError: ``pixels`` or ``encoder`` is of another kind.

    Example:
        >>> dm = LatentDataModule(pixels, InpaintEncoder(vae), keys={"latents": "samples"})  # doctest: +SKIP
        >>> Trainer().fit(model, datamodule=dm)  # doctest: +SKIP
    """

    def __init__(
        self,
        pixels: LightningDataModule,
        encoder: Encoder,
        masks: MaskSource | None = None,
        keys: Mapping[str, Key | None] | None = None,
        layout: str = "CHW",
        keep_pixels: bool = False,
        seed: int = 0,
        augment: Augment | None = None,
        captions: Captions | None = None,
    ) -> None:
        for name, value, kind in (("pixels", pixels, LightningDataModule), ("encoder", encoder, Encoder)):
            if not isinstance(value, kind):
                raise UserTypeError(f"LatentDataModule: {name} must be a {kind.__name__}, got {type(value).__name__}")
        self.pixels = pixels
        super().__init__()
        self.encoder = encoder
        self.masks = masks
        self.keys = BatchKeys(keys, layout)
        self.keep_pixels = keep_pixels
        self.seed = seed
        self.augment = augment
        self.captions = captions
        self.allow_zero_length_dataloader_with_multiple_devices = (
            pixels.allow_zero_length_dataloader_with_multiple_devices
        )
        self.prepare_data_per_node = pixels.prepare_data_per_node
        self._noted: list[int | str] | None = None  # ids of the batch between its first and its last hook
        self._passes = False
        self._warned = False
        self._calls = count()
        if pixels.hparams:
            self.save_hyperparameters(dict(pixels.hparams))
        for name in LOADERS:  # Lightning takes a stage as defined where the method is overridden
            if not is_overridden(name, pixels, LightningDataModule):
                setattr(self, name, getattr(super(), name))

    # ---------------------------------------------------------------- delegation

    @property
    def trainer(self) -> Trainer | None:
        """The trainer, known to the wrapped data module as well."""
        return self._trainer

    @trainer.setter
    def trainer(self, trainer: Trainer | None) -> None:
        self._trainer = trainer
        self.pixels.trainer = trainer

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "pixels" not in self.__dict__:
            raise AttributeError(name)
        try:
            return getattr(self.pixels, name)
        except AttributeError:
            raise AttributeError(
                f"neither LatentDataModule nor its {type(self.pixels).__name__} has the attribute {name!r}"
            ) from None

    def __setattr__(self, name: str, value: Any) -> None:
        """What only ``pixels`` has is set there, as it is looked up there: a tuner's ``batch_size``."""
        own = self.__dict__
        made = "_calls" in own  # the last of __init__
        if name[0] == "_" or name in own or not made or hasattr(type(self), name) or not hasattr(self.pixels, name):
            object.__setattr__(self, name, value)
        else:
            setattr(self.pixels, name, value)

    @property
    def channels(self) -> dict[str, int]:
        """Output key (our name) → channels, of those at latent resolution, for a model that fits itself to the encoder.

        Known from `setup` on, as in ``configure_model``.
        """
        return self.encoder.channels

    def prepare_data(self) -> None:
        """Delegates."""
        self.pixels.prepare_data()

    def setup(self, stage: str) -> None:
        """Delegates; then makes the autoencoder and puts it on this rank's device.

        Raises:
            ValueError: the model would bypass or replace the hooks in which the latents are made.
        """
        self.pixels.setup(stage)
        if self.trainer is not None:
            _check_model(self.trainer.lightning_module)
            self.encoder.setup(self.trainer.strategy.root_device)

    def teardown(self, stage: str) -> None:
        """Delegates; then frees the device of the autoencoder, as Lightning frees it of the model."""
        self.pixels.teardown(stage)
        if self.trainer is not None:
            self.encoder.setup("cpu")

    def train_dataloader(self) -> Any:
        """Delegates."""
        return self.pixels.train_dataloader()

    def val_dataloader(self) -> Any:
        """Delegates."""
        return self.pixels.val_dataloader()

    def test_dataloader(self) -> Any:
        """Delegates."""
        return self.pixels.test_dataloader()

    def predict_dataloader(self) -> Any:
        """Delegates."""
        return self.pixels.predict_dataloader()

    def on_exception(self, exception: BaseException) -> None:
        """Delegates."""
        self.pixels.on_exception(exception)

    def state_dict(self) -> dict[str, Any]:
        """Delegates. Nothing here has a state of its own: every draw follows from the trainer's progress."""
        return self.pixels.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Delegates."""
        self.pixels.load_state_dict(state_dict)

    # ---------------------------------------------------------------- the way of a batch

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """On the host: notes the samples' ids, so that no draw waits for the device; changes captions if asked to."""
        self._passes, self._noted = self._is_example(batch), None
        if self._passes:
            return batch
        self._warn_if_rounded(batch)
        batch = self.pixels.on_before_batch_transfer(batch, dataloader_idx)
        if is_batch(batch):
            index = self.keys.find(batch).get(INDEX)
            self._noted = index.flatten().tolist() if isinstance(index, Tensor) else None
            batch = self._captioned(batch, dataloader_idx)
        return batch

    def _captioned(self, batch: Any, dataloader_idx: int) -> Any:
        if self.captions is None:
            return batch
        found = self.keys.find(batch)
        if found.get(CAPTION) is None:
            raise UserError(self.keys.missing_caption(batch))
        noted = self._noted
        ids = self._ids({**found, PIXELS: found[CAPTION]}, dataloader_idx)
        self._noted = noted
        draws = Draws(self.seed, self._epoch, ids)
        return self.keys.replace(batch, {CAPTION: self.captions(found[CAPTION], draws, self._training)})

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Delegates; Lightning's own copies pinned memory without blocking."""
        if self._passes:
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        return self.pixels.transfer_batch_to_device(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """On the device: pixels → latents.

        Args:
            batch: holds ``pixels`` ``b c H W`` and what the mask source and the encoder ask for. Anything that is no
                dict, tuple or list passes unchanged, as does the model's ``example_input_array``.
            dataloader_idx: Lightning's.

        Returns:
            The batch with the encoder's keys in the place of pixels and mask, in the trainer's input dtype.

        Raises:
            ValueError: naming the key, its shape and dtype, and what was expected.
        """
        passes, self._passes = self._passes, False
        if passes:
            return batch
        batch = self.pixels.on_after_batch_transfer(batch, dataloader_idx)
        if not is_batch(batch):
            self._warn_if_bare(batch)
            return batch
        inputs, outputs = self.encode(batch, dataloader_idx)
        results = dict(outputs)
        if self.keep_pixels:
            results[PIXELS] = crop(inputs[PIXELS], self.encoder.vae.spatial_compression)
        if self.augment is not None and self._training:  # what stays in the batch must lie where its image does
            moved = {name: inputs[name] for name in GEOMETRY if name in inputs}
            results = {name: value for name, value in moved.items() if name not in self.encoder.consumes} | results
        batch = self.keys.write(batch, results, drop=self.encoder.consumes)
        if self.trainer is not None:
            batch = self.trainer.precision_plugin.convert_input(batch)
        self._tell("on_encode_end", inputs, outputs, batch)
        return batch

    def _warn_if_bare(self, batch: Any) -> None:
        """A loader of bare tensors would train on pixels: say so once."""
        if isinstance(batch, Tensor) and self.trainer is not None and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"LatentDataModule: the batch is a bare tensor ({describe(batch)}) and passes as it is, without being "
                "encoded; yield a dict, as in {'pixels': images}"
            )

    def encode(self, batch: Any, dataloader_idx: int = 0) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a batch holds and what the encoder makes of it, before either gets the user's names.

        Args:
            batch: as in `on_after_batch_transfer`, on the device.
            dataloader_idx: Lightning's.

        Returns:
            Under our names: what the encoder was given (``pixels``, the ``mask`` that the mask source made, …), and
            its results in float32.
        """
        inputs = self.keys.read(batch)
        self._tell("on_encode_start", inputs)
        draws = Draws(self.seed, self._epoch, self._ids(inputs, dataloader_idx))
        if self.augment is not None and self._training:
            inputs = self.augment(inputs, draws)
        if MASK in self.encoder.consumes:
            if self.masks is not None:
                inputs[MASK] = self.masks(inputs, draws)
            if MASK not in inputs:
                raise UserError(self.keys.missing_mask(batch))
        return inputs, self.encoder.encode(inputs, draws)

    def _tell(self, hook: str, *observed: Any) -> None:
        """Callbacks of the trainer may observe the encoding: see `latentdm.callbacks.EncodeCallback`."""
        trainer: Any = self.trainer
        for callback in [] if trainer is None else trainer.callbacks:
            if hasattr(callback, hook):
                getattr(callback, hook)(trainer, trainer.lightning_module, *observed)

    @property
    def _training(self) -> bool:
        return self.trainer is not None and self.trainer.training

    @property
    def _epoch(self) -> int:
        return self.trainer.current_epoch if self.trainer is not None and self._training else 0

    def _ids(self, inputs: Mapping[str, Any], dataloader_idx: int) -> list[int | str]:
        """One id a sample: its index, or the place of this batch in its run."""
        noted, self._noted = self._noted, None
        b = len(inputs[PIXELS])
        index = noted if noted is not None and len(noted) == b else inputs.get(INDEX)
        if index is not None:
            return sample_ids(index, b, "LatentDataModule")
        rank = 0 if self.trainer is None else self.trainer.global_rank
        return [f"rank{rank}.loader{dataloader_idx}.batch{self._batch_number()}.{place}" for place in range(b)]

    def _batch_number(self) -> int:
        """The place of this batch in its epoch or evaluation, as Lightning counts it and saves it in checkpoints."""
        trainer = self.trainer
        if trainer is None or trainer.state.status != TrainerStatus.RUNNING:
            return next(self._calls)  # by hand, as in a notebook
        epoch = trainer.fit_loop.epoch_loop
        loops: dict[TrainerFn | None, Any] = {
            TrainerFn.FITTING: epoch if trainer.training else epoch.val_loop,
            TrainerFn.VALIDATING: trainer.validate_loop,
            TrainerFn.TESTING: trainer.test_loop,
            TrainerFn.PREDICTING: trainer.predict_loop,
        }
        return int(loops[trainer.state.fn].batch_progress.current.ready)

    def _is_example(self, batch: Any) -> bool:
        """Whether this is the model's ``example_input_array``, which is made of latents already."""
        model = self.trainer.lightning_module if self.trainer is not None else None
        return model is not None and batch is not None and batch is model.example_input_array

    def _warn_if_rounded(self, batch: Any) -> None:
        """Say once what a precision plugin has taken from float images, which it casts before any hook."""
        if self._warned or self.trainer is None or not is_batch(batch):
            return
        for name, value in self.keys.find(batch).items():
            if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16):
                self._warned = True
                rank_zero_warn(
                    f"LatentDataModule: {name} came as {describe(value)}: precision={self.trainer.precision} rounds "
                    "float images before they are encoded, by up to half an 8-bit level; yield uint8, which loses "
                    "nothing and crosses to the device at half the bytes"
                )
                return


def _check_model(model: LightningModule) -> None:
    """A model that replaces the hooks, or fetches batches itself, would silently train on pixels."""
    name = type(model).__name__
    for hook in HOOKS:
        if is_overridden(hook, model, LightningModule):
            raise UserError(
                f"LatentDataModule: {name} overrides {hook}, where the latents are made, and Lightning would call only "
                "one of the two; move that code into the pixel data module, whose hooks are called too"
            )
    for step in STEPS:
        method = getattr(model, step, None)
        code = getattr(method, "__code__", None)
        if code is not None and "dataloader_iter" in code.co_varnames[: code.co_argcount]:
            raise UserError(
                f"LatentDataModule: {name}.{step} takes dataloader_iter, which bypasses the batch-transfer hooks; "
                f"take batch and batch_idx instead: {step}(self, batch, batch_idx)"
            )
