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
    if path.is_dir():
        # Joined here: given both, diffusers would read the subfolder's config and then weights that lie above it.
        source, subfolder = path / (_subfolder(path, subfolder) or ""), None
        _refuse_pickles(source, use_safetensors)
    settings, subfolder = _read_config(source, subfolder, revision)
    autoencoder_class = class_named(settings.get("_class_name"), f"FrozenVAE: {source}")
    try:
        # Building the module draws weights that are then overwritten; and what does not fit is said once, below.
        with torch.random.fork_rng(devices=[]), _quiet("diffusers.models.modeling_utils"):
            model, info = autoencoder_class.from_pretrained(
                source,
                subfolder=subfolder,
                revision=revision,
                use_safetensors=use_safetensors,
                variant=variant,
                output_loading_info=True,
                low_cpu_mem_usage=False,
            )
    except OSError as error:
        raise _no_weights(source, subfolder, variant, error) from error
    except RuntimeError as error:  # sizes that differ
        raise UserError(_misfit(source, autoencoder_class.__name__, _one_line(error))) from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        _refuse_keys(kind, info.get(kind) or (), source, autoencoder_class.__name__)
    return model  # type: ignore[no-any-return]


def build_autoencoder(
    config: Mapping[str, Any] | str | PathLike[str], seed: int = 0, source: str | None = None
) -> nn.Module:
    """Build the class that a config names with random weights drawn from ``seed``; ``source`` is to be their origin."""
    settings = config if isinstance(config, Mapping) else _read_json(Path(config))
    autoencoder_class = class_named(settings.get("_class_name"), "FrozenVAE: the config")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return autoencoder_class.from_config({**settings, "_name_or_path": source})  # type: ignore[no-any-return]


# ---------------------------------------------------------------- folders and hub repositories


def _package_folder(source: str) -> Path:
    spec = find_spec(source.removeprefix(PACKAGE))
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{_OWNER}: {source!r} names no installed package")
    return Path(spec.submodule_search_locations[0])


def _subfolder(folder: Path, subfolder: str | None) -> str | None:
    """Where in a local folder the autoencoder lies."""
    holds_one = (folder / CONFIG).exists()
    if subfolder is None:
        return "vae" if not holds_one and (folder / "vae").is_dir() else None
    return None if holds_one and not (folder / subfolder).is_dir() else subfolder


def _read_config(
    source: str | PathLike[str], subfolder: str | None, revision: str | None
) -> tuple[Mapping[str, Any], str | None]:
    """The config, and the subfolder it was found in: a pipeline on the hub has one in ``vae`` and none above."""
    from diffusers import AutoencoderKL

    def read(place: str | None) -> Mapping[str, Any]:
        return AutoencoderKL.load_config(source, subfolder=place, revision=revision)  # type: ignore[no-any-return]

    try:
        return read(subfolder), subfolder
    except OSError as error:
        if subfolder is None and not Path(source).exists():
            try:
                return read("vae"), "vae"
            except OSError:
                pass  # the first error says more
        place = f"{source}/{subfolder}" if subfolder else f"{source}"
        advice = "Give a hub id, a folder with config.json or a vae/ folder in it, or a .safetensors file"
        if not Path(source).exists():  # what diffusers says of a hub that it cannot reach sounds like a wrong id
            advice = (
                "There is no such folder here, and the hub gave nothing: offline and not in its cache, a repository "
                f"that wants a login (hf auth login), or a wrong id. {advice}"
            )
        raise UserError(f"{_OWNER}: no autoencoder at {place!r}: {_one_line(error)} {advice}") from error


def _refuse_pickles(folder: Path, use_safetensors: bool) -> None:
    """Pickled weights can run code: they are loaded where somebody asks for them, not where nothing else lies."""
    pickled = sorted(file.name for file in folder.glob("*") if file.suffix in PICKLES)
    if use_safetensors and pickled and not any(folder.glob("*.safetensors*")):
        raise UserError(
            f"{_OWNER}: {str(folder)!r} has only pickled weights ({pickled[0]}), which are not loaded unasked; "
            "save them as .safetensors, or set use_safetensors: false if you trust them"
        )


def _no_weights(source: object, subfolder: str | None, variant: str | None, error: OSError) -> UserError:
    place = f"{source}/{subfolder}" if subfolder else f"{source}"
    wanted = "" if variant is None else f" with variant={variant!r}"
    advice = (
        "If its file is named as in diffusion_pytorch_model.fp16.safetensors, set variant: fp16"
        if variant is None
        else "It may have no such file: leave variant out"
    )
    return UserError(
        f"{_OWNER}: {place!r} has a config but no weights that can be loaded{wanted}: {_one_line(error)} {advice}; if "
        "it has only a .bin file and you trust it, use_safetensors: false"
    )


# ---------------------------------------------------------------- single files


def _load_single_file(path: Path, config: str | PathLike[str] | None, use_safetensors: bool) -> nn.Module:
    if not path.is_file():
        raise UserError(f"{_OWNER}: no file {str(path)!r}")
    if path.suffix in PICKLES and use_safetensors:
        raise UserError(
            f"{_OWNER}: {path.name} is a pickle, which is not loaded unasked; save it as .safetensors, "
            "or set use_safetensors: false if you trust it"
        )
    settings_at = Path(config) if config is not None else path.parent / CONFIG
    if not settings_at.exists():
        raise UserError(
            f"{_OWNER}: the single file {str(path)!r} needs a config that names its class, and {str(settings_at)!r} is "
            "not there; put the model's config.json beside the file, or name one with config: a folder or a JSON file"
        )
    settings = _read_json(settings_at)
    autoencoder_class = class_named(settings.get("_class_name"), f"FrozenVAE: {settings_at}")
    model = build_autoencoder(settings, source=str(path))
    weights = _in_diffusers_keys(_read_weights(path), model, settings, path)
    expected = model.state_dict()
    _refuse_keys("missing_keys", expected.keys() - weights.keys(), path, autoencoder_class.__name__)
    _refuse_keys("unexpected_keys", weights.keys() - expected.keys(), path, autoencoder_class.__name__)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:  # sizes that differ
        raise UserError(_misfit(path, autoencoder_class.__name__, _one_line(error))) from error
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

        name = type(model).__name__
        conversions: dict[str, Any] = SINGLE_FILE_LOADABLE_CLASSES
        convert = conversions.get(name, {}).get("checkpoint_mapping_fn")
        if convert is None:
            return weights  # whose keys are then refused by name
        try:
            weights = convert(checkpoint=weights, config={**model.config, **settings})
        except (KeyError, IndexError, RuntimeError) as error:
            raise UserError(_misfit(path, name, f"no conversion from its format: {_one_line(error)}")) from error
    if hasattr(model, "_fix_state_dict_keys_on_load"):  # the attention of old Stable Diffusion files
        model._fix_state_dict_keys_on_load(weights)
    return weights


# ---------------------------------------------------------------- errors


def _refuse_keys(kind: str, keys: Any, source: object, class_name: str) -> None:
    if keys:
        first, *_ = sorted(str(key) for key in keys)
        raise UserError(_misfit(source, class_name, f"{len(keys)} {kind.replace('_', ' ')}, the first {first!r}"))


def _misfit(source: object, class_name: str, what: str) -> str:
    return (
        f"{_OWNER}: the weights at {str(source)!r} do not fit {class_name}: {what}; "
        "save the model again, or name another source"
    )


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


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
