"""A data module that passes for the one it wraps, whatever Lightning asks of it."""

from copy import deepcopy
from typing import Any

from lightning.pytorch import LightningDataModule, Trainer

from latentdm.errors import UserTypeError


class Delegated:
    """A method of the wrapped data module, as a method of the wrapper.

    Lightning looks at the code of a method to see whether a stage is defined. It finds that of ``pixels``, or of a
    subclass of the wrapper that has its own.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, wrapper: Any, owner: type) -> Any:
        if wrapper is None or wrapper.pixels is None:
            return getattr(LightningDataModule, self._name)
        return getattr(wrapper.pixels, self._name)


class Wrapper(LightningDataModule):
    """Wraps a data module; its loaders, state and hyperparameters go on working, and so do its attributes.

    Attributes that this class lacks are looked up on ``pixels``, but for private ones.

    Args:
        pixels: any LightningDataModule.

    Raises:
        UserTypeError: it is something else.
    """

    pixels: Any = None  # of the class: Lightning's __init__ sets the trainer, which ours hands on

    prepare_data = Delegated()
    train_dataloader = Delegated()
    val_dataloader = Delegated()
    test_dataloader = Delegated()
    predict_dataloader = Delegated()
    on_exception = Delegated()
    state_dict = Delegated()
    load_state_dict = Delegated()

    def __init__(self, pixels: LightningDataModule) -> None:
        super().__init__()
        if not isinstance(pixels, LightningDataModule):
            raise UserTypeError(_no_data_module(pixels))
        self.pixels = pixels
        self.allow_zero_length_dataloader_with_multiple_devices = (
            pixels.allow_zero_length_dataloader_with_multiple_devices
        )
        self.prepare_data_per_node = pixels.prepare_data_per_node
        if pixels.hparams:  # as Lightning would log and save those of the pixels; a copy, for a subclass adds its own
            self._hparams = deepcopy(pixels.hparams)
            self._hparams_initial = deepcopy(pixels.hparams_initial)
            self._log_hyperparams = pixels._log_hyperparams

    @property
    def trainer(self) -> Trainer | None:
        """The trainer, known to the wrapped data module as well."""
        return self._trainer

    @trainer.setter
    def trainer(self, trainer: Trainer | None) -> None:
        self._trainer = trainer
        if self.pixels is not None:
            self.pixels.trainer = trainer

    @property
    def batch_size(self) -> Any:
        """That of ``pixels``, where a tuner sets it too."""
        return self.pixels.batch_size

    @batch_size.setter
    def batch_size(self, batch_size: int) -> None:
        self.pixels.batch_size = batch_size

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or self.pixels is None:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        try:
            return getattr(self.pixels, name)
        except AttributeError:
            kind = type(self.pixels).__name__
            raise AttributeError(f"neither LatentDataModule nor its {kind} has the attribute {name!r}") from None


def _no_data_module(pixels: object) -> str:
    text = f"LatentDataModule: pixels must be a LightningDataModule, got {type(pixels).__name__}"
    if any(base.__module__.startswith("pytorch_lightning.") for base in type(pixels).__mro__):
        text += (
            " of the package pytorch_lightning, whose classes are others than those of lightning.pytorch; import "
            "LightningDataModule and Trainer from lightning.pytorch in your code"
        )
    return text
