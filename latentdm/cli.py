"""The command ``latentdm``, and what all of its commands have in common."""

import os
import sys
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib import import_module
from io import TextIOWrapper

from hydra.errors import HydraException

import latentdm

COMMANDS = {
    "cache": "what a cache of latents holds: info, verify, prune, compact, export",
    "completion": "print what bash, zsh or fish runs to complete commands, options, groups and choices",
    "config": "print the configuration that overrides make; with --help the groups and choices there are",
    "doctor": "print versions, devices, what dtype=auto chooses and what is missing, for a bug report",
    "encode": "fill a cache of latents ahead of time, on any number of machines",
    "preview": "draw what a model would see of your data, without training one",
    "report": "write a page about your data and what a model would see of it, before anything trains",
    "train": "fine-tune a model of diffusers, as an experiment has it",
}
"""Command → summary; the module ``latentdm.commands.<command>`` has ``DESCRIPTION``, ``add_options`` and ``run``."""

APART = ("completion", "doctor")
"""Commands that take no config, and need nothing of the current folder: to press Tab in one that is not trusted runs no
code of it.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    The current folder is on ``sys.path`` meanwhile, so that a YAML can name classes of your own that lie there.

    Args:
        arguments: the command and what follows it; None takes those of the process.

    Returns:
        The exit status: 0, 1 where the settings or the data are wrong, 2 where there is no such command.

    Raises:
        Exception: a bug; with ``HYDRA_FULL_ERROR=1`` what is wrong with the settings or the data as well.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal or file without Unicode must not end a run
    command, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command in ("-h", "--help"):
        print(_usage())
        return 0
    if command == "--version":
        print(f"latentdm {latentdm.__version__}")
        return 0
    if command not in COMMANDS:
        print(f"latentdm: no command {command!r}\n{_usage()}", file=sys.stderr)
        return 2
    try:
        with nullcontext() if command in APART else _importing_from(os.getcwd()):
            settings = parser_of(command).parse_intermixed_args(rest)
            import_module(f"latentdm.commands.{command}").run(settings)
    except HydraException as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        print(f"latentdm {command}: {error}", file=sys.stderr)
        return 1
    return 0


def parser_of(command: str) -> ArgumentParser:
    """Its options and, where it takes a config, Hydra's overrides between them."""
    from latentdm.commands.config import add_overrides  # late, as usage and version need no Hydra

    module = import_module(f"latentdm.commands.{command}")
    prog = f"latentdm {command}"
    parser = ArgumentParser(prog=prog, description=module.DESCRIPTION, conflict_handler="resolve")
    module.add_options(parser)
    if command not in APART:
        add_overrides(parser)
    return parser


def _usage() -> str:
    commands = "\n".join(f"  latentdm {name:<10} {summary}" for name, summary in sorted(COMMANDS.items()))
    return (
        f"usage: latentdm COMMAND [options] [overrides]\n\n{commands}\n\n"
        "latentdm COMMAND --help tells its options; latentdm --version the version"
    )


@contextmanager
def _importing_from(folder: str) -> Iterator[None]:
    """Search a folder for modules first, as ``python script.py`` does with that of the script."""
    if sys.flags.safe_path:  # python -P, or PYTHONSAFEPATH: somebody does not trust it
        yield
        return
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
