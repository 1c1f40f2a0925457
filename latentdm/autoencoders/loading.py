"""Autoencoders from a hub, a folder, a single file or a config: always the class that the config names."""

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn


def load_autoencoder(source: str | PathLike[str], subfolder: str | None = None, revision: str | None = None) -> nn.Module:
    """Load an autoencoder of diffusers with its weights, in float32.

    Args:
        source: a hub id, a local folder written by ``save_pretrained``, a whole pipeline's folder (its ``vae/`` is
            taken), or a single ``.safetensors`` file.
        subfolder: where in the repository or folder it lies.
        revision: of a hub repository.

    Raises:
        ValueError: nothing is there, or its weights do not fit the class that the config names.
    """
    path = Path(source)
    if path.suffix == ".safetensors":
        return _load_single_file(path)
    if path.is_dir() and subfolder is None and not (path / "config.json").exists() and (path / "vae").is_dir():
        subfolder = "vae"
    config = _read_config(source, subfolder, revision)
    autoencoder_class = _class_named(config, source)
    model, info = autoencoder_class.from_pretrained(
        source, subfolder=subfolder, revision=revision, use_safetensors=True, output_loading_info=True, low_cpu_mem_usage=False
    )
    _refuse_wrong_keys(info, source, autoencoder_class.__name__)
    return model  # type: ignore[no-any-return]


def build_autoencoder(config: Mapping[str, Any] | str | PathLike[str], seed: int = 0) -> nn.Module:
    """Build the class that a config names with random weights drawn from ``seed``."""
    if not isinstance(config, Mapping):
        path = Path(config)
        config = json.loads((path / "config.json" if path.is_dir() else path).read_text(encoding="utf-8"))
    autoencoder_class = _class_named(config, "the config")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return autoencoder_class.from_config(dict(config))  # type: ignore[no-any-return]


def _read_config(source: str | PathLike[str], subfolder: str | None, revision: str | None) -> Mapping[str, Any]:
    from diffusers import AutoencoderKL

    try:
        return AutoencoderKL.load_config(source, subfolder=subfolder, revision=revision)  # type: ignore[no-any-return]
    except OSError as error:
        place = f"{source}/{subfolder}" if subfolder else f"{source}"
        reason = " ".join(str(error).split())
        raise ValueError(
            f"FrozenVAE.from_pretrained: no autoencoder at {place!r}: {reason} "
            "Give a hub id, a folder with config.json or a vae/ folder in it, or a .safetensors file"
        ) from error


def _class_named(config: Mapping[str, Any], source: object) -> Any:
    import diffusers

    from latentdm.autoencoders.families import families

    name = config.get("_class_name")
    if name not in families():
        raise ValueError(
            f"FrozenVAE: {source} names the class {name!r}, which is not known; known are {', '.join(sorted(families()))}"
        )
    return getattr(diffusers, name)


def _load_single_file(path: Path) -> nn.Module:
    from diffusers import AutoencoderKL

    if not path.is_file():
        raise ValueError(f"FrozenVAE.from_pretrained: no file {str(path)!r}")
    return AutoencoderKL.from_single_file(str(path))  # type: ignore[no-any-return]


def _refuse_wrong_keys(info: Mapping[str, Any], source: object, class_name: str) -> None:
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(kind):
            keys = sorted(str(key) for key in info[kind])
            raise ValueError(
                f"FrozenVAE.from_pretrained: the weights at {str(source)!r} do not fit {class_name}: "
                f"{len(keys)} {kind.replace('_', ' ')}, the first {keys[0]!r}; save the model again, or name another source"
            )
