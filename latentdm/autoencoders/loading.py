"""Autoencoders from a hub, a folder, a single file or a config: always the class that the config names."""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from latentdm.autoencoders.families import class_named
from latentdm.errors import UserError
from latentdm.pipelines import NOT_FOUND, load_weights, misfit, one_line, refuse_keys

CONFIG = "config.json"
PACKAGE = "pkg://"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_OWNER = "FrozenVAE.from_pretrained"


def load_autoencoder(
    source: str | PathLike[str],
    subfolder: str | None = None,
    revision: str | None = None,
    config: str | PathLike[str] | None = None,
    use_safetensors: bool = True,
    variant: str | None = None,
) -> nn.Module:
    """Load an autoencoder with its weights, in float32: a cast to less is `FrozenVAE`'s, who keeps these.

    Args:
        source: a hub id, a local folder written by ``save_pretrained``, a whole pipeline (its ``vae`` is taken), or a
            single file in diffusers' format or in the one that the model was published in. ``pkg://a.b`` is the
            folder of an installed Python package, as in Hydra's search path.
        subfolder: where in the repository or folder it lies; passed over if a local folder lacks it and holds an
            autoencoder itself.
        revision: of a hub repository.
        config: for a single file, the folder or JSON file of its config; by default ``config.json`` beside it.
        use_safetensors: False loads pickled weights (``.bin``) instead.
        variant: of the weights' files, such as ``"fp16"`` for ``diffusion_pytorch_model.fp16.safetensors``.

    Raises:
        ValueError: nothing is there, or its weights do not fit the class that the config names.
    """
    if str(source).startswith(PACKAGE):
        source = _package_folder(str(source))
    path = Path(source)
    if path.suffix == ".safetensors" or (path.suffix in PICKLES and not path.is_dir()):
        if variant is not None:
            raise UserError(f"{_OWNER}: variant={variant!r} is for a folder or a hub id; {str(source)!r} is one file")
        return _load_single_file(path, config, use_safetensors)
    if config is not None:
        raise UserError(f"{_OWNER}: config={str(config)!r} is for a single file; {str(source)!r} has its own")
    if subfolder is not None and (path / CONFIG).exists() and not (path / subfolder).is_dir():
        subfolder = None
    settings, source, subfolder = _find_config(source, subfolder, revision)
    if use_safetensors and path.is_dir():
        _refuse_pickles(Path(source))
    autoencoder_class = class_named(settings.get("_class_name"), f"FrozenVAE: {source}")
    # Building the module draws weights that are then overwritten; and what does not fit is said once, as an error.
    with torch.random.fork_rng(devices=[]), _quiet("diffusers.models.modeling_utils"):
        return load_weights(  # type: ignore[no-any-return]
            _OWNER,
            autoencoder_class,
            source,
            subfolder,
            variant,
            refused=("missing_keys", "unexpected_keys", "mismatched_keys"),
            revision=revision,
            use_safetensors=use_safetensors,
            low_cpu_mem_usage=False,
        )


def build_autoencoder(
    config: Mapping[str, Any] | str | PathLike[str], seed: int = 0, source: str | None = None
) -> nn.Module:
    """Build the class that a config names with random weights drawn from ``seed``; ``source`` is to be their origin."""
    settings = config if isinstance(config, Mapping) else _read_json(Path(config))
    named = "FrozenVAE: the config" if source is None else f"FrozenVAE: the config of {source}"
    autoencoder_class = class_named(settings.get("_class_name"), named)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return autoencoder_class.from_config({**settings, "_name_or_path": source})  # type: ignore[no-any-return]


# ---------------------------------------------------------------- folders and hub repositories


def _package_folder(source: str) -> Path:
    try:
        spec = find_spec(source.removeprefix(PACKAGE))
    except (ModuleNotFoundError, ValueError):  # of a package above it, or of no name at all
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{_OWNER}: {source!r} names no installed package")
    return Path(spec.submodule_search_locations[0])


def _find_config(
    source: str | PathLike[str], subfolder: str | None, revision: str | None
) -> tuple[Mapping[str, Any], str | PathLike[str], str | None]:
    """The config, with the source and subfolder that it was found in: a pipeline has one in ``vae`` and none above."""
    from diffusers import AutoencoderKL

    path, failures = Path(source), []
    for place in (None, "vae") if subfolder is None else (subfolder,):
        # A local folder is joined: given both, diffusers would take a config or weights that lie above the subfolder.
        at = (path / (place or ""), None) if path.is_dir() else (source, place)
        try:
            return AutoencoderKL.load_config(at[0], subfolder=at[1], revision=revision), *at
        except OSError as error:
            failures.append(error)
    first = failures[0]  # it says more
    wanted = f"{source}/{subfolder}" if subfolder else f"{source}"
    advice = "Give a hub id, a folder with config.json or a vae/ folder in it, or a .safetensors file"
    if not path.exists():
        advice = f"{NOT_FOUND[0].upper()}{NOT_FOUND[1:]}. {advice}"
    raise UserError(f"{_OWNER}: no autoencoder at {wanted!r}: {one_line(first)} {advice}") from first


def _refuse_pickles(source: Path) -> None:
    """Pickled weights can run code: they are loaded where somebody asks for them, not where nothing else lies."""
    files = [source] if source.is_file() else sorted(source.iterdir())
    pickled = [file.name for file in files if file.suffix in PICKLES]
    if pickled and not any(".safetensors" in file.name for file in files):
        raise UserError(
            f"{_OWNER}: {str(source)!r} has only pickled weights ({pickled[0]}), which are not loaded unasked; "
            "save them as .safetensors, or set use_safetensors: false if you trust them"
        )


# ---------------------------------------------------------------- single files


def _load_single_file(path: Path, config: str | PathLike[str] | None, use_safetensors: bool) -> nn.Module:
    if not path.is_file():
        raise UserError(f"{_OWNER}: no file {str(path)!r}")
    if use_safetensors:
        _refuse_pickles(path)
    settings_at = Path(config) if config is not None else path.parent / CONFIG
    if not settings_at.exists():
        raise UserError(
            f"{_OWNER}: the single file {str(path)!r} needs a config that names its class, and {str(settings_at)!r} is "
            "not there; put the model's config.json beside the file, or name one with config: a folder or a JSON file"
        )
    settings = _read_json(settings_at)
    model = build_autoencoder(settings, source=str(path))
    weights = _in_diffusers_keys(_read_weights(path), model, settings, path)
    try:
        missing, unexpected = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:  # sizes that differ
        raise misfit(_OWNER, path, type(model), one_line(error)) from error
    refuse_keys(_OWNER, path, type(model), {"missing_keys": missing, "unexpected_keys": unexpected})
    return model


def _read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file; of a whole checkpoint those of its autoencoder."""
    if path.suffix != ".safetensors":
        pickled = torch.load(path, map_location="cpu", weights_only=True)
        weights: dict[str, Tensor] = pickled.get("state_dict", pickled)
        return weights
    with safe_open(path, framework="pt") as file:
        keys = file.keys()
        for prefix in ("first_stage_model.", "vae."):
            if any(key.startswith(prefix) for key in keys):
                return {key.removeprefix(prefix): file.get_tensor(key) for key in keys if key.startswith(prefix)}
        return {key: file.get_tensor(key) for key in keys}


def _in_diffusers_keys(
    weights: dict[str, Tensor], model: Any, settings: Mapping[str, Any], path: Path
) -> dict[str, Tensor]:
    """Weights under the names that diffusers gives them, whatever format they were published in."""
    own = model.state_dict().keys()
    # Either format may share a few names, such as encoder.conv_in: the larger part decides.
    if 2 * len(own & weights.keys()) < len(own):
        from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

        convert = SINGLE_FILE_LOADABLE_CLASSES.get(type(model).__name__, {}).get("checkpoint_mapping_fn")
        if convert is None:
            return weights  # whose keys are then refused by name
        try:
            weights = convert(checkpoint=weights, config={**model.config, **settings})
        except (KeyError, IndexError, RuntimeError) as error:
            what = f"no conversion from its format: {one_line(error)}"
            raise misfit(_OWNER, path, type(model), what) from error
    if hasattr(model, "_fix_state_dict_keys_on_load"):  # the attention of old Stable Diffusion files
        model._fix_state_dict_keys_on_load(weights)
    return weights


def _read_json(path: Path) -> Mapping[str, Any]:
    """A config from its file, or from ``config.json`` in a folder."""
    settings: Mapping[str, Any] = json.loads((path / CONFIG if path.is_dir() else path).read_text(encoding="utf-8"))
    return settings


@contextmanager
def _quiet(logger_name: str) -> Iterator[None]:
    """Errors only from a logger that would list every key."""
    logger = logging.getLogger(logger_name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
