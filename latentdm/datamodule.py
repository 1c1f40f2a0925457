"""`LatentDataModule`: any data module of pixel batches, turned into one of latents inside the batch-transfer hooks."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils.data import DataLoader

from latentdm.batch import INDEX, MASK, PIXELS, BatchKeys, Key, crop
from latentdm.encoders.base import Encoder
from latentdm.masks.sources import MaskSource
from latentdm.randomness import Draws

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
        keys: our name → the user's, for inputs and outputs: a key of a dict batch or a position in a tuple batch.
        layout: ``"CHW"``, or ``"HWC"`` for channels-last images.
        keep_pixels: leave the cropped ``pixels`` (``b c h w``) in the batch.
        seed: of everything random, together with epoch, ``index`` and purpose. Batches without ``index`` are keyed on
            rank, batch and place instead. Validation, test and predict draw as in epoch 0, so that figures compare.

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
        keys: Mapping[str, Key] | None = None,
        layout: str = "CHW",
        keep_pixels: bool = False,
        seed: int = 0,
    ) -> None:
        for name, value, kind in (("pixels", pixels, LightningDataModule), ("encoder", encoder, Encoder)):
            if not isinstance(value, kind):
                raise TypeError(f"LatentDataModule: {name} must be a {kind.__name__}, got {type(value).__name__}")
        self.pixels = pixels
        super().__init__()
        self.encoder = encoder
        self.masks = masks
        self.keys = BatchKeys(keys, layout)
        self.keep_pixels = keep_pixels
        self.seed = seed
        self.allow_zero_length_dataloader_with_multiple_devices = (
            pixels.allow_zero_length_dataloader_with_multiple_devices
        )
        self.prepare_data_per_node = pixels.prepare_data_per_node
        self._pending: list[int | str] | None = None  # ids of the batch between its first and its last hook
        self._passes = False
        self._counted: tuple[Any, ...] = ()
        self._batches = 0
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

    @property
    def channels(self) -> dict[str, int]:
        """Output key (our name) → channels, of those at latent resolution. Known from `setup` on, as in
        ``configure_model``, so that a model can fit itself to the encoder.
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
        return self._whole(self.pixels.train_dataloader())

    def val_dataloader(self) -> Any:
        """Delegates."""
        return self._whole(self.pixels.val_dataloader())

    def test_dataloader(self) -> Any:
        """Delegates."""
        return self._whole(self.pixels.test_dataloader())

    def predict_dataloader(self) -> Any:
        """Delegates."""
        return self._whole(self.pixels.predict_dataloader())

    def on_exception(self, exception: BaseException) -> None:
        """Delegates."""
        self.pixels.on_exception(exception)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped data module's state, and the count that keys batches without ``index``. No weights."""
        return {"pixels": self.pixels.state_dict(), "batches": self._batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores `state_dict`."""
        self.pixels.load_state_dict(state_dict["pixels"])
        self._batches = state_dict["batches"]

    # ---------------------------------------------------------------- the way of a batch

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """On the host: notes the samples' ids, so that no draw waits for the device. The batch stays as it is."""
        batch = _open(batch)
        batch = self.pixels.on_before_batch_transfer(batch, dataloader_idx)
        self._passes = self._is_no_batch(batch)
        if not self._passes:
            self._pending = self._ids(self.keys.read(batch), dataloader_idx)
        return batch

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Delegates; Lightning's own copies pinned memory without blocking."""
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
        batch = self.pixels.on_after_batch_transfer(batch, dataloader_idx)
        if passes or self._is_no_batch(batch):
            return batch
        inputs = self.keys.read(batch)
        ids, self._pending = self._pending or self._ids(inputs, dataloader_idx), None
        draws = Draws(self.seed, self._epoch, ids)
        needs_mask = MASK in self.encoder.consumes
        if needs_mask and self.masks is not None:
            inputs[MASK] = self.masks(inputs, draws)
        results = self.encoder.encode(inputs, draws)
        if self.keep_pixels:
            results[PIXELS] = crop(inputs[PIXELS], self.encoder.vae.spatial_compression)
        batch = self.keys.write(batch, results, drop=self.encoder.consumes)
        return batch if self.trainer is None else self.trainer.precision_plugin.convert_input(batch)

    @property
    def _epoch(self) -> int:
        return self.trainer.current_epoch if self.trainer is not None and self.trainer.training else 0

    def _ids(self, inputs: Mapping[str, Tensor], dataloader_idx: int) -> list[int | str]:
        """One id a sample: its index, or the place of this batch in its run."""
        if isinstance(inputs.get(INDEX), Tensor):
            ids: list[int | str] = inputs[INDEX].flatten().tolist()
            if len(ids) != len(inputs[PIXELS]):
                raise ValueError(f"{INDEX}: got {len(ids)} for {len(inputs[PIXELS])} images; give one an image")
            return ids
        rank = 0
        if self.trainer is not None:
            rank = self.trainer.global_rank
            # A new epoch of training, or a new run of validation, counts from the start.
            state = self.trainer.state
            place = self._epoch if self.trainer.training else self.trainer.global_step
            if (state.fn, state.stage, place) != self._counted:
                first = not self._counted
                self._counted = (state.fn, state.stage, place)
                self._batches = self._batches if first else 0
        batch = self._batches
        self._batches += 1
        return [f"rank{rank}.loader{dataloader_idx}.batch{batch}.{place}" for place in range(len(inputs[PIXELS]))]

    def _is_no_batch(self, batch: Any) -> bool:
        if not isinstance(batch, Mapping | tuple | list):
            return True
        model = self.trainer.lightning_module if self.trainer is not None else None
        return model is not None and batch is model.example_input_array

    # ---------------------------------------------------------------- float images, kept whole

    def _whole(self, loaders: Any) -> Any:
        """Hide float images from a precision plugin that would round them before the hooks."""
        if self.trainer is None:
            return loaders
        full = torch.ones((), dtype=torch.float32)
        if self.trainer.precision_plugin.convert_input(full).dtype in (torch.float32, torch.float64):
            return loaders
        if isinstance(loaders, DataLoader):
            if not isinstance(loaders.collate_fn, _ClosingCollate):
                loaders.collate_fn = _ClosingCollate(loaders.collate_fn, self.keys)
        elif isinstance(loaders, CombinedLoader):
            self._whole(loaders.iterables)
        elif isinstance(loaders, Mapping):
            for loader in loaders.values():
                self._whole(loader)
        elif isinstance(loaders, list | tuple):
            for loader in loaders:
                self._whole(loader)
        else:
            rank_zero_warn(
                f"LatentDataModule: {type(loaders).__name__} is no torch DataLoader, so the trainer's precision rounds its "
                "float images before they are encoded; yield uint8 images to keep every bit"
            )
        return loaders


class _Closed:
    """A tensor that Lightning's conversion of inputs does not see; it can still be pinned."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def pin_memory(self, device: str | None = None) -> "_Closed":
        return _Closed(self.tensor.pin_memory())


class _ClosingCollate:
    """A loader's own collate function, with float images and masks closed afterwards. Workers pickle it."""

    def __init__(self, collate: Any, keys: BatchKeys) -> None:
        self.collate = collate
        self.keys = keys

    def __call__(self, samples: Any) -> Any:
        batch = self.collate(samples)
        if not isinstance(batch, Mapping | tuple | list):
            return batch
        floats = {
            name: _Closed(value)
            for name, value in self.keys.find(batch).items()
            if isinstance(value, Tensor) and value.is_floating_point()
        }
        return self.keys.replace(batch, floats) if floats else batch


def _open(batch: Any) -> Any:
    """The batch with its closed tensors opened."""
    if isinstance(batch, Mapping):
        closed = {key: value.tensor for key, value in batch.items() if isinstance(value, _Closed)}
        return {**batch, **closed} if closed else batch
    if isinstance(batch, tuple | list) and any(isinstance(value, _Closed) for value in batch):
        return type(batch)(value.tensor if isinstance(value, _Closed) else value for value in batch)
    return batch


def _check_model(model: LightningModule) -> None:
    """A model that replaces the hooks, or fetches batches itself, would silently train on pixels."""
    name = type(model).__name__
    for hook in HOOKS:
        if is_overridden(hook, model, LightningModule):
            raise ValueError(
                f"LatentDataModule: {name} overrides {hook}, where the latents are made, and Lightning would call only one of "
                "the two; move that code into the pixel data module, whose hooks are called too"
            )
    for step in STEPS:
        method = getattr(model, step, None)
        code = getattr(method, "__code__", None)
        if code is not None and "dataloader_iter" in code.co_varnames[: code.co_argcount]:
            raise ValueError(
                f"LatentDataModule: {name}.{step} takes dataloader_iter, which bypasses the batch-transfer hooks; "
                f"take batch and batch_idx instead: {step}(self, batch, batch_idx)"
            )
