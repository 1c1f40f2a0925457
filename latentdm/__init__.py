"""latentdm: a frozen VAE in the batch-transfer hooks, so that any Lightning training loop receives latents.

The names are imported on first use, so that ``import latentdm`` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentdm import callbacks, data, finetune, masks
    from latentdm.augment import Augment
    from latentdm.autoencoders import FrozenVAE, register_family
    from latentdm.cache import Cache
    from latentdm.captions import Captions
    from latentdm.datamodule import LatentDataModule
    from latentdm.encoders import InpaintEncoder, PlainEncoder
    from latentdm.stages import Stage
    from latentdm.text import TextEncoder

__version__ = "0.2.0"
__all__ = [
    "Augment",
    "Cache",
    "Captions",
    "FrozenVAE",
    "InpaintEncoder",
    "LatentDataModule",
    "PlainEncoder",
    "Stage",
    "TextEncoder",
    "callbacks",
    "data",
    "finetune",
    "masks",
    "register_family",
]

_HOMES = {
    "Augment": "latentdm.augment",
    "Cache": "latentdm.cache",
    "Captions": "latentdm.captions",
    "FrozenVAE": "latentdm.autoencoders",
    "register_family": "latentdm.autoencoders",
    "InpaintEncoder": "latentdm.encoders",
    "PlainEncoder": "latentdm.encoders",
    "LatentDataModule": "latentdm.datamodule",
    "Stage": "latentdm.stages",
    "TextEncoder": "latentdm.text",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in __all__:
        return import_module(f"latentdm.{name}")
    raise AttributeError(f"module 'latentdm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
