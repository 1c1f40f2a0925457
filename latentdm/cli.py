"""The command ``latentdm``: ``latentdm preview`` shows what a model would see, without training one."""

import json
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict

from latentdm.errors import UserError, plain_errors

USAGE = "latentdm preview [options] [overrides]\n\nlatentdm preview --help says more"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: the command and what follows it; None takes those of the process.

    Returns:
        The exit status: 0, 1 where the settings or the data are wrong, 2 where there is no such command.

    Raises:
        Exception: a bug; with ``HYDRA_FULL_ERROR=1`` what is wrong with the settings or the data as well.
    """
    command, *rest = (sys.argv[1:] if arguments is None else arguments) or [""]
    if command not in COMMANDS:
        asked = command in ("", "-h", "--help")
        print(USAGE if asked else f"latentdm: no command {command!r}; usage: {USAGE}", file=sys.stderr)
        return 0 if asked else 2
    try:
        COMMANDS[command](rest)
    except HydraException as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        print(f"latentdm {command}: {error}", file=sys.stderr)
        return 1
    return 0


def preview_command(arguments: Sequence[str]) -> None:
    """``latentdm preview``: encode one batch, draw it, and say what to check."""
    parser = ArgumentParser(
        prog="latentdm preview",
        description="Draw what a model would see of your data: images, masks, and latents decoded again. "
        "Takes the overrides of train_example.py, as in: "
        "latentdm preview pixels=folder pixels.root=photos pixels.size=256 masks=batch",
    )
    parser.add_argument("--samples", type=_count, default=4, help="rows of the picture (default: 4)")
    parser.add_argument("--output", type=Path, default=Path("preview.png"), help="the PNG (default: preview.png)")
    parser.add_argument("--stage", choices=["train", "val"], default="train", help="whose data (default: train)")
    parser.add_argument("--device", help="where to encode (default: cuda if there is one, else cpu)")
    settings = _parsed(parser, arguments)
    cfg = composed(settings)
    with plain_errors(cfg):
        _draw(cfg, settings)


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {"preview": preview_command}


def composed(settings: Namespace) -> DictConfig:
    """The config that the options and overrides of a command ask for.

    Raises:
        HydraException: a choice, a key or a value is wrong, or it holds no data module.
    """
    folder = settings.config_dir
    where = (
        initialize_config_module("latentdm.conf", version_base="1.3")
        if folder is None
        else initialize_config_dir(str(Path(folder).resolve()), version_base="1.3")
    )
    with where:
        try:
            cfg = compose(settings.config_name, overrides=_overrides(settings), return_hydra_config=True)
        except ValueError as error:  # Hydra's answer to masks=null
            raise ConfigCompositionException(f"{error}; to leave a group out: ~masks instead of masks=null") from error
    with open_dict(cfg):
        cfg.hydra.runtime.output_dir = str(Path.cwd())
    HydraConfig.instance().set_config(cfg)  # so that ${hydra:…} resolves
    if OmegaConf.is_missing(cfg, "datamodule") or cfg.get("datamodule") is None:
        raise ConfigCompositionException(
            f"the config {settings.config_name!r} has no datamodule; add '- datamodule: latent' to its defaults, with "
            "pixels, vae, encoder and masks"
        )
    return cfg


def _overrides(settings: Namespace) -> list[str]:
    """The overrides, and latentdm's groups on the search path of a config of the user's own, behind what is there."""
    if settings.config_dir is None or any(each.startswith("hydra.searchpath=") for each in settings.overrides):
        return list(settings.overrides)
    file = Path(settings.config_dir, settings.config_name.removesuffix(".yaml") + ".yaml")
    own = OmegaConf.select(OmegaConf.load(file), "hydra.searchpath") if file.is_file() else None
    paths = dict.fromkeys([*(own or []), "pkg://latentdm.conf"])
    return [*settings.overrides, f"hydra.searchpath={json.dumps(list(paths), ensure_ascii=False)}"]


def _draw(cfg: DictConfig, settings: Namespace) -> None:
    """Write the picture, and print where it is and what to check."""
    import torch  # all of it late, as composing says sooner what is wrong
    from PIL import Image

    from latentdm.preview import describe, first_samples, preview

    if settings.output.is_dir() or settings.output.suffix.lower() not in Image.registered_extensions():
        raise UserError(f"--output {settings.output}: expected the name of a picture, such as preview.png")
    device = _device(settings.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.manual_seed(cfg.get("seed", 0))
    datamodule = instantiate(cfg.datamodule)
    inputs, outputs, captions = first_samples(datamodule, settings.samples, device, settings.stage)
    notes = describe(datamodule.encoder, inputs, outputs)
    picture = preview(datamodule.encoder, inputs, outputs, captions, settings.samples, notes)
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    picture.save(settings.output)
    print(settings.output.resolve())
    for note in notes:
        print(f"  {note}")


def _device(name: str) -> Any:
    """A torch device that can hold a tensor."""
    import torch

    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # as torch answers to an unknown one and to one that is not there
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from error


def _parsed(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    """The options of a command, those that every command has, and Hydra's overrides between them."""
    parser.add_argument("--config-name", default="train", help="of your own app (default: train, the example's)")
    parser.add_argument("--config-dir", help="folder of your own configs; the groups of latentdm are known there too")
    parser.add_argument("overrides", nargs="*", help="as for train_example.py: group=choice, key=value")
    return parser.parse_intermixed_args(list(arguments))


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise UserError(text)
    return count
