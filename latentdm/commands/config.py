"""``latentdm config``; and what commands share: Hydra's options and overrides, their config, counts and a device."""

import json
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig, OmegaConf, open_dict

from latentdm.commands.choices import listed
from latentdm.errors import UserError, plain_errors

DESCRIPTION = "Print the configuration that overrides make, as YAML, and do nothing else."


def add_options(parser: ArgumentParser) -> None:
    """Those of the command: a help that lists the groups and choices, those of ``--config-dir`` among them."""
    parser.add_argument("-h", "--help", action="store_true", help="show this, and the groups and choices there are")
    parser.set_defaults(usage=parser.format_help)


def run(settings: Namespace) -> None:
    """Print the config, or with ``--help`` the groups and choices it is made of.

    Raises:
        HydraException: a choice, a key or a value is wrong.
    """
    if settings.help:
        print(f"{settings.usage()}\n{listed(settings.config_dir)}")
    else:
        print(OmegaConf.to_yaml(compose_config(settings)), end="")


def add_overrides(parser: ArgumentParser) -> None:
    """Add what every command takes that has a config: whose it is, and Hydra's overrides."""
    parser.add_argument("--config-name", default="train", help="of your own app (default: train, the example's)")
    parser.add_argument("--config-dir", help="folder of your own configs; the groups of latentdm are known there too")
    parser.add_argument("overrides", nargs="*", help="group=choice, key=value; latentdm config --help lists them")


@contextmanager
def composed(settings: Namespace, output: Path | None = None) -> Iterator[DictConfig]:
    """Work with the config that a command asks for; a mistake in it or in the data is told in one line.

    Args:
        settings: what was parsed.
        output: as for `compose_config`.

    Raises:
        HydraException: the settings or the data are wrong.
    """
    cfg = compose_config(settings, output)
    with plain_errors(cfg):
        yield cfg


def compose_config(settings: Namespace, output: Path | None = None) -> DictConfig:
    """The config that the options and overrides of a command ask for, without Hydra's own part.

    Args:
        settings: what was parsed.
        output: the run's folder, which Hydra makes of an app; None is the current one.

    Raises:
        HydraException: a choice, a key or a value is wrong, or it holds no data module.
    """
    with initialized(settings) as overrides:
        try:
            cfg = compose(settings.config_name, overrides=overrides, return_hydra_config=True)
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


@contextmanager
def initialized(settings: Namespace) -> Iterator[list[str]]:
    """Hydra where it finds the configs of a command, and the overrides that it is to be given.

    A config of the user's own finds latentdm's groups as well, behind what is on its search path.
    """
    folder, overrides = settings.config_dir, list(settings.overrides)
    if folder is None:
        with initialize_config_module("latentdm.conf", version_base="1.3"):
            yield overrides
        return
    if not any(each.startswith("hydra.searchpath=") for each in overrides):
        file = Path(folder, settings.config_name.removesuffix(".yaml") + ".yaml")
        own = OmegaConf.select(OmegaConf.load(file), "hydra.searchpath") if file.is_file() else None
        paths = dict.fromkeys([*(own or []), "pkg://latentdm.conf"])
        overrides.append(f"hydra.searchpath={json.dumps(list(paths), ensure_ascii=False, separators=(',', ':'))}")
    with initialize_config_dir(str(Path(folder).resolve()), version_base="1.3"):
        yield overrides


def count(text: str) -> int:
    """The value of an option that counts from 1."""
    found = int(text)
    if found < 1:
        raise ArgumentTypeError(f"at least 1, got {text}")
    return found


def add_data(parser: ArgumentParser) -> None:
    """Add the options of commands that encode some samples: whose data, and where."""
    parser.add_argument("--stage", choices=["train", "val"], default="train", help="whose data (default: train)")
    parser.add_argument("--device", help="where to encode (default: cuda if there is one, else cpu)")


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
