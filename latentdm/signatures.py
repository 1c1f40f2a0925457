"""The parameters of the classes that the YAMLs under ``conf/`` use. Written by ``make schemas``: do not edit.

Path of a class in latentdm → parameter → its type as OmegaConf knows it, and its default.
"""

from typing import Any

from omegaconf import MISSING

# fmt: off
SIGNATURES: dict[str, dict[str, tuple[Any, Any]]] = {
    "Augment": {
        "flip": (float, 0.0), "crop": (list[float] | None, None), "aspect": (float, 1.3333333333333333),
        "brightness": (float, 0.0), "contrast": (float, 0.0), "saturation": (float, 0.0), "hue": (float, 0.0),
    },
    "Captions": {
        "dropout": (float, 0.0), "shuffle_tags": (bool, False), "keep_tags": (int, 1), "separator": (str, ','),
        "templates": (list[str], []),
    },
    "FrozenVAE/from_config": {
        "_partial_": (bool, True), "config": (Any, MISSING), "seed": (int, 0), "dtype": (str, 'auto'),
        "compile": (bool | str, False), "tiling": (str, 'never'),
    },
    "FrozenVAE/from_pretrained": {
        "_partial_": (bool, True), "source": (str, MISSING), "subfolder": (str | None, None),
        "revision": (str | None, None), "dtype": (str, 'auto'), "encoder_only": (bool, False),
        "config": (str | None, None), "use_safetensors": (bool, True), "compile": (bool | str, False),
        "tiling": (str, 'never'), "variant": (str | None, None),
    },
    "InpaintEncoder": {
        "vae": (Any, MISSING), "grow_mask_by": (int | None, None), "mask_offset": (int | None, None),
        "per_batch": (int | None, None), "posterior": (str, 'sample'), "latent_mask": (str, 'nearest'),
        "progress": (bool, False), "fill": (float, 0.5), "multiple": (int | None, None),
    },
    "LatentDataModule": {
        "pixels": (Any, MISSING), "encoder": (Any, MISSING), "masks": (Any, None), "augment": (Any, None),
        "captions": (Any, None), "text": (Any, None), "stages": (Any, []), "cache": (Any, None), "keys": (Any, None),
        "layout": (str, 'CHW'), "pixel_range": (list[float], [0, 1]), "keep_pixels": (bool, False), "seed": (int, 0),
    },
    "PlainEncoder": {
        "vae": (Any, MISSING), "per_batch": (int | None, None), "posterior": (str, 'sample'), "progress": (bool, False),
        "multiple": (int | None, None),
    },
    "TextEncoder/from_pretrained": {
        "_partial_": (bool, True), "source": (str, MISSING), "dtype": (str, 'auto'), "max_length": (int | None, None),
        "zero_empty": (bool | None, None), "revision": (str | None, None), "variant": (str | None, None),
    },
    "cache/Cache": {
        "dir": (str | None, None), "variants": (int | None, None), "mask_variants": (int | None, None),
        "dtype": (str, 'auto'), "identity": (str, 'stat'),
    },
    "callbacks/EncodeMonitor": {
    },
    "callbacks/GracefulStop": {
    },
    "callbacks/LatentPreview": {
        "every_n_steps": (int, 500), "samples": (int, 4), "caption": (int | str | None, None),
        "dirpath": (str | None, None),
    },
    "callbacks/LatentStats": {
        "std_range": (list[float], [0.5, 2.0]), "mask_range": (list[float], [0.001, 0.95]), "per_channel": (bool, True),
    },
    "callbacks/PerBatchFinder": {
        "candidates": (list[int] | None, None), "rounds": (int, 3), "max_seconds": (float, 60.0),
    },
    "callbacks/SamplePreview": {
        "samples": (int, 4), "caption": (int | str | None, None), "dirpath": (str | None, None),
    },
    "callbacks/VAEOffload": {
        "stages": (list[str], ['predict']),
    },
    "data/HuggingFaceData": {
        "path": (str, MISSING), "size": (int, 512), "batch_size": (int, 16), "name": (str | None, None),
        "revision": (str | None, None), "split": (str, 'train'), "val_split": (str | None, None),
        "val_share": (float, 0.1), "columns": (Any, None), "streaming": (bool, False), "epoch_length": (int, 1024),
        "val_length": (int, 64), "shuffle_buffer": (int, 256), "parts": (int, 64), "alpha": (bool, False),
        "flip": (bool, False), "random_crop": (bool, True), "num_workers": (int, 0), "seed": (int, 0),
        "on_error": (str, 'raise'), "max_skipped_share": (float, 0.05), "max_pixels": (int, 178956970),
        "read_timeout": (float, 300.0), "allow_outside": (bool, False),
    },
    "data/ImageFolderData": {
        "root": (str, MISSING), "size": (int, 512), "batch_size": (int, 16), "val_share": (float, 0.1),
        "val_root": (str | None, None), "masks": (str, 'auto'), "captions": (str, 'auto'), "columns": (Any, None),
        "alpha": (bool, False), "flip": (bool, False), "num_workers": (int, 0), "seed": (int, 0),
        "on_error": (str, 'raise'), "max_skipped_share": (float, 0.05), "max_pixels": (int, 178956970),
        "index_dir": (str | None, None), "random_crop": (bool, True), "buckets": (Any, None), "sources": (str, 'auto'),
        "segmentations": (str, 'auto'), "read_timeout": (float, 300.0),
    },
    "data/LatentsData": {
        "root": (str, MISSING), "size": (int | None, None), "batch_size": (int, 16), "val_share": (float, 0.1),
        "num_workers": (int, 0), "seed": (int, 0), "on_error": (str, 'raise'), "max_skipped_share": (float, 0.05),
    },
    "data/SamplesData": {
        "size": (int, 128), "batch_size": (int, 16), "epoch_length": (int, 1024), "val_length": (int, 64),
        "num_workers": (int, 0), "seed": (int, 0),
    },
    "data/WebDatasetData": {
        "shards": (Any, MISSING), "size": (int, 512), "batch_size": (int, 16), "epoch_length": (int, 1024),
        "val_shards": (Any, None), "val_length": (int, 64), "columns": (Any, None), "shuffle_buffer": (int, 256),
        "parts": (int, 64), "alpha": (bool, False), "flip": (bool, False), "random_crop": (bool, True),
        "num_workers": (int, 0), "seed": (int, 0), "on_error": (str, 'raise'), "max_skipped_share": (float, 0.05),
        "max_pixels": (int, 178956970), "read_timeout": (float, 300.0), "allow_pipe": (bool, False),
    },
    "finetune/FluxFill": {
        "pretrained": (str, MISSING), "lora": (Any, None), "guidance": (float, 1.0), "times": (str, 'logit_normal'),
        "guidance_scale": (float, 30.0), "learning_rate": (float | None, None), "warmup_steps": (int, 0),
        "schedule": (str, 'constant'), "optimizer": (str, 'adamw'), "weight_decay": (float, 0.01),
        "gradient_checkpointing": (bool, False), "dtype": (str, 'auto'), "masked_weight": (float, 1.0),
        "sampling_steps": (int, 30), "seed": (int, 0), "revision": (str | None, None), "variant": (str | None, None),
    },
    "finetune/Lora": {
        "rank": (int | None, None), "alpha": (float | None, None), "targets": (list[str] | None, None),
    },
    "finetune/SaveForDiffusers": {
        "every_n_steps": (int | None, None), "kohya": (bool, False), "dirpath": (str | None, None),
    },
    "finetune/StableDiffusion": {
        "pretrained": (str, MISSING), "lora": (Any, None), "widen": (bool, False), "snr_gamma": (float | None, None),
        "learning_rate": (float | None, None), "warmup_steps": (int, 0), "schedule": (str, 'constant'),
        "optimizer": (str, 'adamw'), "weight_decay": (float, 0.01), "gradient_checkpointing": (bool, False),
        "dtype": (str, 'auto'), "masked_weight": (float, 1.0), "sampling_steps": (int, 30),
        "guidance_scale": (float, 7.5), "seed": (int, 0), "revision": (str | None, None), "variant": (str | None, None),
    },
    "masks/AlphaMask": {
        "invert": (bool, False),
    },
    "masks/BatchMask": {
    },
    "masks/FeatheredMask": {
        "source": (Any, MISSING), "pixels": (int, 8),
    },
    "masks/MixedMask": {
        "sources": (dict[str, Any], MISSING), "probabilities": (Any, None),
    },
    "masks/RandomMask": {
        "kinds": (list[str], ['boxes', 'strokes']), "share": (list[float], [0.1, 0.5]), "boxes": (list[int], [1, 4]),
        "segments": (list[int], [3, 8]), "polygons": (list[int], [1, 2]), "sides": (list[int], [1, 4]),
        "complement": (float, 0.0), "whole": (float, 0.0),
    },
    "masks/SegmentationMask": {
        "classes": (list[int], MISSING), "invert": (bool, False),
    },
}
