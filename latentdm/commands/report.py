"""``latentdm report``: a page about one's own data, before anything trains."""

import re
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from latentdm.commands.config import add_data, composed, count, device_of
from latentdm.errors import UserError

SECRET = re.compile(r"(^|_)(token|secret|passw(or)?d|api_?key|access_key|credentials?)$", re.IGNORECASE)
"""Settings whose values a page that is passed on must not hold."""

SIGNED = re.compile(
    r"(?<=://)[^/@\s]+@|(?<=[?&])([\w-]*(?:token|sig|signature|key|credential|password)[\w-]*=)[^&\s'\"]+", re.I
)
"""In addresses: the user and password, and parameters that let somebody in."""


DESCRIPTION = (
    "Write a page about your data as a model would see them: samples, sizes, masks, captions, latents, what is left "
    "out, and what a cache and an epoch would take. Nothing is trained. Takes the overrides of train_example.py, as "
    "in: latentdm report pixels=folder pixels.root=photos pixels.size=256 masks=batch"
)


def add_options(parser: ArgumentParser) -> None:
    """Those of the command."""
    parser.add_argument("--samples", type=count, default=64, help="how many to look at (default: 64)")
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="the page (default: report.html)")
    add_data(parser)


def run(settings: Namespace) -> None:
    """Write the page, and print its path and what to check.

    Raises:
        HydraException: the settings or the data are wrong.
    """
    with composed(settings) as cfg:
        import torch  # all of it late, as composing says sooner what is wrong
        from hydra.utils import instantiate

        from latentdm.commands import doctor
        from latentdm.report import look, page, write

        if settings.output.is_dir() or settings.output.suffix.lower() not in (".html", ".htm"):
            raise UserError(f"--output {settings.output}: expected the name of a page, such as report.html")
        device = device_of(settings.device)
        torch.manual_seed(cfg.get("seed", 0))
        found = look(instantiate(cfg.datamodule), settings.samples, device, settings.stage)
        write(settings.output, page(found, shown(cfg), doctor.as_text(doctor.report())))
        print(settings.output.resolve())
        if found.ended:
            print(f"  CHECK: looking ended early: {found.ended}")
        for alarm in found.alarms:
            print(f"  CHECK: {alarm}.")


def shown(cfg: DictConfig) -> str:
    """The configuration as YAML, without what lets somebody in."""
    return OmegaConf.to_yaml(OmegaConf.create(_without_secrets(OmegaConf.to_container(cfg))))


def _without_secrets(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: "(left out)" if SECRET.search(str(key)) and isinstance(held, str) else _without_secrets(held)
            for key, held in value.items()
        }
    if isinstance(value, list):
        return [_without_secrets(held) for held in value]
    return (
        SIGNED.sub(lambda found: f"{found[1] or ''}…{'' if found[1] else '@'}", value)
        if isinstance(value, str)
        else value
    )
