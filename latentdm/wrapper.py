"""A data module that passes for the one it wraps, whatever Lightning asks of it."""

from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.parsing import AttributeDict
from torch.utils.data import DataLoader, Dataset

from latentdm.errors import UserTypeError


class OfPixels:
    """A method of the wrapped data module, or an attribute that Lightning or a tuner sets on it.

    Lightning looks at the code of a method to see whether a stage is defined. It finds that of ``pixels``, or of a
    subclass of the wrapper that has its own.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, wrapper: Any, owner: type) -> Any:
        if wrapper is None or wrapper.pixels is None:
            return getattr(LightningDataModule, self._name, None)
        return getattr(wrapper.pixels, self._name)

    def __set__(self, wrapper: Any, value: Any) -> None:
        if wrapper.pixels is not None:  # Lightning's __init__ sets defaults before
            setattr(wrapper.pixels, self._name, value)


class HyperparametersKey:
    """Under which a checkpoint keeps hyperparameters.

    Those of the wrapped data module are where its own would be, so that it can be loaded from there; those that a
    subclass of the wrapper saved have a key of their own. For ``load_from_checkpoint`` passes to a class what it finds
    under its key, and a ``seed`` or ``masks`` of the pixels is another than ours.
    """

    def __get__(self, wrapper: Any, owner: type) -> str:
        key = LightningDataModule.CHECKPOINT_HYPER_PARAMS_KEY
        return f"latent_{key}" if wrapper is None or wrapper.has_own_hparams else key


class Wrapper(LightningDataModule):
    """Wraps a data module; its loaders, state and hyperparameters go on working, and so do its attributes.

    Attributes that this class lacks are looked up on ``pixels``, but for private ones. ``hparams`` are those of
    ``pixels``, and what changes there changes here. A subclass that calls ``save_hyperparameters`` has its own instead;
    loggers are given both.

    Args:
        pixels: any LightningDataModule.

    Raises:
        UserTypeError: it is something else.
    """

    pixels: Any = None  # of the class: Lightning's __init__ sets what is of the pixels

    CHECKPOINT_HYPER_PARAMS_KEY = HyperparametersKey()

    name = OfPixels()
    trainer = OfPixels()
    batch_size = OfPixels()
    prepare_data_per_node = OfPixels()
    allow_zero_length_dataloader_with_multiple_devices = OfPixels()

    prepare_data = OfPixels()
    train_dataloader = OfPixels()
    val_dataloader = OfPixels()
    test_dataloader = OfPixels()
    predict_dataloader = OfPixels()
    on_exception = OfPixels()
    state_dict = OfPixels()
    load_state_dict = OfPixels()

    def __init__(self, pixels: LightningDataModule) -> None:
        super().__init__()
        if not isinstance(pixels, LightningDataModule):
            raise UserTypeError(_no_data_module(pixels))
        self.pixels = pixels

    # ---------------------------------------------------------------- hyperparameters

    @property
    def has_own_hparams(self) -> bool:
        """Whether a subclass has saved hyperparameters of its own."""
        return "_hparams" in vars(self)

    @property
    def hparams(self) -> Any:
        """Those that a subclass has saved, or those of ``pixels``."""
        return self._hparams if self.has_own_hparams else self.pixels.hparams

    @property
    def hparams_initial(self) -> Any:
        """As they were saved, for loggers: those of ``pixels``, and over them those that a subclass has saved."""
        theirs = self.pixels.hparams_initial
        if not self.has_own_hparams:
            return theirs
        return AttributeDict({**(theirs if self.pixels._log_hyperparams else {}), **super().hparams_initial})

    def _set_hparams(self, hp: Any) -> None:
        if not self.has_own_hparams:
            self._hparams = AttributeDict()  # Lightning would add to what `hparams` gives: those of the pixels
        super()._set_hparams(hp)

    @property
    def _log_hyperparams(self) -> bool:
        logged: bool = self._logs_own if self.has_own_hparams else self.pixels._log_hyperparams
        return logged

    @_log_hyperparams.setter
    def _log_hyperparams(self, logged: bool) -> None:
        self._logs_own = logged

    def __getattr__(self, name: str) -> Any:
        if self.pixels is None or (name.startswith("_") and name != "_hparams_name"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        try:
            return getattr(self.pixels, name)
        except AttributeError:
            kind = type(self.pixels).__name__
            raise AttributeError(f"neither LatentDataModule nor its {kind} has the attribute {name!r}") from None


def _no_data_module(pixels: object) -> str:
    text = f"LatentDataModule: pixels must be a LightningDataModule, got {type(pixels).__name__}"
    if isinstance(pixels, type):
        return f"LatentDataModule: pixels must be a LightningDataModule, got the class {pixels.__name__}; call it"
    if any(base.__module__.startswith("pytorch_lightning.") for base in type(pixels).__mro__):
        return (
            f"{text} of the package pytorch_lightning, whose classes are others than those of lightning.pytorch; "
            "import LightningDataModule and Trainer from lightning.pytorch in your code"
        )
    if isinstance(pixels, DataLoader):
        return f"{text}; write one whose train_dataloader returns it"
    if isinstance(pixels, Dataset):
        return f"{text}; wrap it: LightningDataModule.from_datasets(train_dataset=…, batch_size=…)"
    return text
