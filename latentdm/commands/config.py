"""``latentdm config``; and what commands share: Hydra's options and overrides, their config, counts and a device."""

import json
from argparse import ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig, OmegaConf, open_dict

from latentdm.commands.choices import listed
from latentdm.errors import UserError


def run(arguments: Sequence[str]) -> None:
    """Run the command: print the config, or with ``--help`` the groups and choices it is made of.

    Args:
        arguments: its options and overrides.

    Raises:
        HydraException: a choice, a key or a value is wrong.
    """
    given = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    given.add_argument("--config-dir", nargs="?")
    parser = ArgumentParser(
        prog="latentdm config",
        description="Print the configuration that overrides make, as YAML, and do nothing else.",
        epilog=listed(given.parse_known_args(list(arguments))[0].config_dir),
        formatter_class=RawDescriptionHelpFormatter,
    )
    cfg = compose_config(parse(parser, arguments))
    print(OmegaConf.to_yaml(cfg), end="")


def parse(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    """The options of a command, those that every command has, and Hydra's overrides between them."""
    parser.add_argument("--config-name", default="train", help="of your own app (default: train, the example's)")
    parser.add_argument("--config-dir", help="folder of your own configs; the groups of latentdm are known there too")
    parser.add_argument("overrides", nargs="*", help="group=choice, key=value; latentdm config --help lists them")
    return parser.parse_intermixed_args(list(arguments))


def compose_config(settings: Namespace, output: Path | None = None) -> DictConfig:
    """The config that the options and overrides of a command ask for, without Hydra's own part.

    Args:
        settings: from `parse`.
        output: the run's folder, which Hydra makes of an app; None is the current one.

    Raises:
        HydraException: a choice, a key or a value is wrong, or it holds no data module.
    """
    folder = settings.config_dir
    initialized = (
        initialize_config_module("latentdm.conf", version_base="1.3")
        if folder is None
        else initialize_config_dir(str(Path(folder).resolve()), version_base="1.3")
    )
    with initialized:
        try:
            cfg = compose(settings.config_name, overrides=_overrides(settings), return_hydra_config=True)
        except ValueError as error:  # Hydra's answer to masks=null
            raise ConfigCompositionException(f"{error}; to leave a group out: ~masks instead of masks=null") from error
    with open_dict(cfg):
        cfg.hydra.runtime.output_dir = str(output or Path.cwd())
    HydraConfig.instance().set_config(cfg)  # a copy of its own part, so that ${hydra:…} resolves
    with open_dict(cfg):
        del cfg["hydra"]
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


def count(text: str) -> int:
    """The value of an option that counts from 1."""
    found = int(text)
    if found < 1:
        raise ArgumentTypeError(f"at least 1, got {text}")
    return found


def with_data(parser: ArgumentParser) -> ArgumentParser:
    """Add the options of commands that encode some samples: whose data, and where."""
    parser.add_argument("--stage", choices=["train", "val"], default="train", help="whose data (default: train)")
    parser.add_argument("--device", help="where to encode (default: cuda if there is one, else cpu)")
    return parser


def device_of(name: str | None) -> Any:
    """The torch device of ``--device``, which can hold a tensor; None takes CUDA's first, or the CPU without one.

    Raises:
        UserError: there is no such device.
    """
    import torch  # late, as composing says sooner what is wrong

    try:
        return torch.empty(0, device=name or ("cuda" if torch.cuda.is_available() else "cpu")).device
    except (RuntimeError, AssertionError) as error:  # of an unknown device, and of one that is missing
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from error
