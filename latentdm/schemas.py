"""Schemas of the config groups: a typo or a wrong type fails when Hydra composes, and names the key.

One dataclass a target, its fields the target's parameters (a test compares them). Registered under ``schema/…``, so
that the choices of a group, which Hydra lists after a wrong one, are those that a person can choose. Hydra's plugin
imports this module at every start: it may import nothing heavy.
"""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


@dataclass
class LatentDataModule:
    """``datamodule``."""

    _target_: str = "latentdm.LatentDataModule"
    pixels: Any = MISSING
    encoder: Any = MISSING
    masks: Any = None
    keys: Any = None  # an optional dict in a schema cannot be set from the command line
    layout: str = "CHW"
    keep_pixels: bool = False
    seed: int = 0
    augment: Any = None
    captions: Any = None
    encode_ahead: int = 0


@dataclass
class PlainEncoder:
    """``encoder=plain`` and ``encoder=batched``."""

    _target_: str = "latentdm.PlainEncoder"
    vae: Any = MISSING
    per_batch: int | None = None
    posterior: str = "sample"
    progress: bool = False


@dataclass
class _InpaintEncoder(PlainEncoder):
    _target_: str = "latentdm.InpaintEncoder"
    latent_mask: str = "nearest"


@dataclass
class GrowInpaintEncoder(_InpaintEncoder):
    """``encoder=inpaint``."""

    grow_mask_by: int = 6


@dataclass
class OffsetInpaintEncoder(_InpaintEncoder):
    """``encoder=inpaint_offset``."""

    mask_offset: int = 6


@dataclass
class PretrainedVAE:
    """``vae=…`` from a hub, a folder or a file. Partial: the encoder loads it in its ``setup``, on every rank."""

    _target_: str = "latentdm.FrozenVAE.from_pretrained"
    _partial_: bool = True
    source: str = MISSING
    subfolder: str | None = None
    revision: str | None = None
    dtype: str = "auto"
    encoder_only: bool = False
    config: str | None = None
    use_safetensors: bool = True
    compile: bool | str = False
    tiling: str = "never"
    variant: str | None = None


@dataclass
class RandomVAE:
    """``vae=…`` with random weights. Partial, as `PretrainedVAE`."""

    _target_: str = "latentdm.FrozenVAE.from_config"
    _partial_: bool = True
    config: Any = MISSING
    seed: int = 0
    dtype: str = "auto"
    compile: bool | str = False
    tiling: str = "never"


@dataclass
class BatchMask:
    """``masks=batch``."""

    _target_: str = "latentdm.masks.BatchMask"


@dataclass
class AlphaMask:
    """``masks=alpha``."""

    _target_: str = "latentdm.masks.AlphaMask"
    invert: bool = False


@dataclass
class RandomMask:
    """``masks=random``."""

    _target_: str = "latentdm.masks.RandomMask"
    kinds: list[str] = field(default_factory=lambda: ["boxes", "strokes"])
    share: list[float] = field(default_factory=lambda: [0.1, 0.5])
    boxes: list[int] = field(default_factory=lambda: [1, 4])
    segments: list[int] = field(default_factory=lambda: [3, 8])
    polygons: list[int] = field(default_factory=lambda: [1, 2])
    sides: list[int] = field(default_factory=lambda: [1, 4])
    complement: float = 0.0
    whole: float = 0.0


@dataclass
class SegmentationMask:
    """``masks=segmentation``."""

    _target_: str = "latentdm.masks.SegmentationMask"
    classes: list[int] = MISSING
    invert: bool = False


@dataclass
class MixedMask:
    """``masks=mixed``."""

    _target_: str = "latentdm.masks.MixedMask"
    sources: dict[str, Any] = MISSING
    probabilities: dict[str, float] | None = None


@dataclass
class FeatheredMask:
    """``masks=feathered``."""

    _target_: str = "latentdm.masks.FeatheredMask"
    source: Any = MISSING
    pixels: int = 8


@dataclass
class Augment:
    """``augment=…``."""

    _target_: str = "latentdm.Augment"
    flip: float = 0.0
    crop: list[float] | None = None
    aspect: float = 4 / 3
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0


@dataclass
class Captions:
    """``captions=…``."""

    _target_: str = "latentdm.Captions"
    dropout: float = 0.0
    shuffle_tags: bool = False
    keep_tags: int = 1
    separator: str = ","
    templates: list[str] = field(default_factory=list)


@dataclass
class _PixelData:
    _target_: str = MISSING
    size: int = 512
    batch_size: int = 16
    num_workers: int = 0
    seed: int = 0


@dataclass
class SamplesData(_PixelData):
    """``pixels=samples``."""

    _target_: str = "latentdm.data.SamplesData"
    size: int = 128
    epoch_length: int = 1024
    val_length: int = 64


@dataclass
class ImageFolderData(_PixelData):
    """``pixels=folder``."""

    _target_: str = "latentdm.data.ImageFolderData"
    root: str = MISSING
    val_share: float = 0.1
    val_root: str | None = None
    masks: str = "auto"
    captions: str = "auto"
    columns: Any = None
    alpha: bool = False
    flip: bool = False
    on_error: str = "raise"
    max_skipped_share: float = 0.05
    max_pixels: int = 178_956_970
    index_dir: str | None = None
    random_crop: bool = True
    buckets: Any = None
    sources: str = "auto"


@dataclass
class HuggingFaceData(_PixelData):
    """``pixels=huggingface``."""

    _target_: str = "latentdm.data.HuggingFaceData"
    path: str = MISSING
    name: str | None = None
    revision: str | None = None
    split: str = "train"
    val_split: str | None = None
    val_share: float = 0.1
    columns: Any = None
    streaming: bool = False
    epoch_length: int = 1024
    val_length: int = 64
    shuffle_buffer: int = 256
    alpha: bool = False
    flip: bool = False
    on_error: str = "raise"
    max_skipped_share: float = 0.05
    max_pixels: int = 178_956_970


@dataclass
class WebDatasetData(_PixelData):
    """``pixels=webdataset``."""

    _target_: str = "latentdm.data.WebDatasetData"
    shards: Any = MISSING
    epoch_length: int = 1024
    val_shards: Any = None
    val_length: int = 64
    columns: Any = None
    shuffle_buffer: int = 256
    alpha: bool = False
    flip: bool = False
    on_error: str = "raise"
    max_skipped_share: float = 0.05
    max_pixels: int = 178_956_970


@dataclass
class EncodeMonitor:
    """``callbacks=encode_monitor``."""

    _target_: str = "latentdm.callbacks.EncodeMonitor"


@dataclass
class LatentStats:
    """``callbacks=latent_stats``."""

    _target_: str = "latentdm.callbacks.LatentStats"
    std_range: list[float] = field(default_factory=lambda: [0.5, 2.0])
    mask_range: list[float] = field(default_factory=lambda: [0.001, 0.95])
    per_channel: bool = True


@dataclass
class LatentPreview:
    """``callbacks=latent_preview``."""

    _target_: str = "latentdm.callbacks.LatentPreview"
    every_n_steps: int = 500
    samples: int = 4
    caption: Any = None
    dirpath: str | None = None


@dataclass
class SamplePreview:
    """``callbacks=sample_preview``."""

    _target_: str = "latentdm.callbacks.SamplePreview"
    samples: int = 4
    caption: Any = None
    dirpath: str | None = None


@dataclass
class PerBatchFinder:
    """``callbacks=per_batch_finder``."""

    _target_: str = "latentdm.callbacks.PerBatchFinder"
    candidates: Any = None
    rounds: int = 3
    max_seconds: float = 60.0


@dataclass
class VAEOffload:
    """``callbacks=vae_offload``."""

    _target_: str = "latentdm.callbacks.VAEOffload"
    stages: list[str] = field(default_factory=lambda: ["predict"])


SCHEMAS: dict[str, dict[str, type]] = {
    "datamodule": {"latent": LatentDataModule},
    "encoder": {
        "plain": PlainEncoder,
        "inpaint": GrowInpaintEncoder,
        "inpaint_offset": OffsetInpaintEncoder,
    },
    "vae": {"pretrained": PretrainedVAE, "random": RandomVAE},
    "callbacks": {
        "encode_monitor": EncodeMonitor,
        "latent_stats": LatentStats,
        "latent_preview": LatentPreview,
        "sample_preview": SamplePreview,
        "per_batch_finder": PerBatchFinder,
        "vae_offload": VAEOffload,
    },
    "masks": {
        "batch": BatchMask,
        "alpha": AlphaMask,
        "random": RandomMask,
        "segmentation": SegmentationMask,
        "mixed": MixedMask,
        "feathered": FeatheredMask,
    },
    "augment": {"standard": Augment},
    "captions": {"standard": Captions},
    "pixels": {
        "samples": SamplesData,
        "folder": ImageFolderData,
        "huggingface": HuggingFaceData,
        "webdataset": WebDatasetData,
    },
}
"""Group → name → schema."""


def register_schemas() -> None:
    """Put the schemas into Hydra's store under ``schema/<group>/<name>``. Hydra's plugin calls this."""
    store = ConfigStore.instance()
    for group, schemas in SCHEMAS.items():
        for name, schema in schemas.items():
            store.store(group=f"schema/{group}", name=name, node=schema, provider="latentdm")
