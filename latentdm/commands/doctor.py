"""``latentdm doctor``: what a bug report should hold, and what is missing."""

import json
import os
import platform
import shutil
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from packaging.requirements import Requirement

import latentdm

IMPORTED = ("torch", "lightning", "diffusers")
"""Packages that are imported: a version alone does not say that one works."""

FOR_CONTRIBUTORS = ("test",)
"""Extras that no user needs."""

VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "HYDRA_FULL_ERROR", "OMP_NUM_THREADS", "PYTHONSAFEPATH",
    "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF",
)  # fmt: skip
"""Of the environment, those that change what happens. None of them holds a secret."""

Report = dict[str, Any]


DESCRIPTION = (
    "Print versions, devices, what dtype=auto chooses on them, cores, memory, the cache and the extras that are "
    "missing, for a bug report. It tells no host name and no token."
)


def add_options(parser: ArgumentParser) -> None:
    """Those of the command."""
    parser.add_argument("--json", action="store_true", help="as JSON, for programs")


def run(settings: Namespace) -> None:
    """Print the report."""
    found = report()
    print(json.dumps(found, indent=2) if settings.json else as_text(found))


def as_text(found: Report) -> str:
    """The report as YAML in ASCII, whatever the terminal: a line for each package and device."""
    text: str = yaml.safe_dump(found, sort_keys=False, default_flow_style=None, width=120)
    return text.rstrip()


def report() -> Report:
    """All that the command prints; what is wrong is a ``problem``."""
    base, extras = _requirements()
    compilers = (name for name in ("cc", "gcc", "clang", "cl") if shutil.which(name))
    bare = {} if extras else {"problem": "latentdm is not installed as a package; pip install it"}
    return {
        **bare,
        "latentdm": latentdm.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {each.name: _state(each) for each in base},
        "extras": {name: _states(needed, name) for name, needed in extras.items()},
        "devices": _devices(),
        "cores": _cores(),
        "memory": _memory(),
        "cache": _cache(),
        "compiler": next(compilers, "none: compile= runs eagerly"),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


# ---------------------------------------------------------------- packages


def _requirements() -> tuple[list[Requirement], dict[str, list[Requirement]]]:
    """Of latentdm, as its installed metadata has them: what it needs, and extra → what that needs beside it."""
    try:
        every = [Requirement(text) for text in requires("latentdm") or ()]
        extras = metadata("latentdm").get_all("Provides-Extra") or ()
    except PackageNotFoundError:  # a folder on the path, and not installed
        return [Requirement(name) for name in IMPORTED], {}
    base = _needed(every, "")
    beside = {name: [each for each in _needed(every, name) if each not in base] for name in extras}
    return base, {name: needed for name, needed in beside.items() if name not in FOR_CONTRIBUTORS}


def _needed(every: Sequence[Requirement], extra: str) -> list[Requirement]:
    """What latentdm needs with an extra, "" for none, and the extras that this one brings along."""
    needed = [each for each in every if each.marker is None or each.marker.evaluate({"extra": extra})]
    included = [name for each in needed if each.name == "latentdm" for name in sorted(each.extras)]
    needed = [each for each in needed if each.name != "latentdm"]
    return needed + [each for name in included for each in _needed(every, name)]


def _states(needed: Sequence[Requirement], extra: str) -> dict[str, Report]:
    """Those of an extra; a problem names the extra that brings what is missing."""
    states = {each.name: _state(each) for each in needed}
    for state in states.values():
        if "problem" in state:
            state["problem"] += f"; pip install 'latentdm[{extra}]'"
    return states


def _state(requirement: Requirement) -> Report:
    """``version``, None where it is missing, and ``problem`` where there is one."""
    name = requirement.name
    try:
        installed = version(name)
    except PackageNotFoundError:
        return {"version": None, "problem": "missing"}
    if not requirement.specifier.contains(installed, prereleases=True):
        return {"version": installed, "problem": f"needs {requirement.specifier}"}
    if name in IMPORTED:
        try:
            import_module(name)
        except Exception as error:  # whatever a broken installation raises
            return {"version": installed, "problem": f"cannot be imported: {type(error).__name__}: {error}"}
    return {"version": installed}


# ---------------------------------------------------------------- the machine


def _devices() -> list[Report]:
    """Each device, and the dtype that ``dtype=auto`` takes there for an autoencoder of diffusers."""
    try:
        import torch

        from latentdm.frozen.weights import bfloat16_features
    except Exception:  # told with the packages
        return []
    devices: list[Report] = [{"device": "cpu", "name": platform.machine()}]
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        memory = _gib(properties.total_memory)
        devices.append({"device": f"cuda:{number}", "name": properties.name, "memory_gib": memory})
    if torch.backends.mps.is_available():
        devices.append({"device": "mps", "name": "Apple"})
    for each in devices:
        features = bfloat16_features(torch.device(each["device"]))
        each["dtype_auto"] = "bfloat16" if features else "float32"
        each["why"] = (
            f"it multiplies in bfloat16 itself ({', '.join(features)})"
            if features
            else "it does not multiply in bfloat16 itself"
        )
    return devices


def _cores() -> Report:
    """Of the machine, those that this process may use, and torch's threads."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores: Report = {"machine": os.cpu_count(), "usable": allowed}
    with suppress(Exception):  # told with the packages
        cores["torch_threads"] = import_module("torch").get_num_threads()
    return cores


def _memory() -> Report:
    """GiB of the machine, of the container's limit where there is one, and what loaders share; None if unknown."""
    names = getattr(os, "sysconf_names", {})
    known = "SC_PHYS_PAGES" in names and "SC_PAGE_SIZE" in names
    limit, shared = Path("/sys/fs/cgroup/memory.max"), Path("/dev/shm")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return {
        "machine_gib": _gib(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")) if known else None,
        "limit_gib": _gib(int(text)) if text.isdigit() else None,
        "shared_gib": _gib(shutil.disk_usage(shared).total) if shared.is_dir() else None,
    }


def _cache() -> Report:
    """Where ``cache=disk`` keeps latents unless told, what lies there, whether more may, and what entries depend on."""
    try:
        from omegaconf import OmegaConf

        from latentdm.cache.cache import FORMAT
        from latentdm.cache.keys import decoder
    except Exception:  # told with the packages
        return {}
    folder = Path(str(OmegaConf.load(str(files("latentdm.conf") / "cache" / "disk.yaml")).dir)).expanduser()
    there = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    home = Path.home()
    report: Report = {
        "dir": f"~/{folder.relative_to(home)}" if folder.is_relative_to(home) else str(folder),
        "encoders": len(list(folder.glob("*/space.json"))),
        "used_gib": _gib(sum(_bytes(path) for path in folder.rglob("*.safetensors"))),
        "writable": there.is_dir() and os.access(there, os.W_OK),
        "versions": {"format": str(FORMAT), **decoder()},
    }
    if not report["writable"]:
        report["problem"] = "may not be written to; set cache.dir"
    try:
        report["free_gib"] = round(shutil.disk_usage(there).free / 2**30)
    except OSError as error:
        report["problem"] = str(error)
    return report


def _bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # merged meanwhile
        return 0


def _gib(size: int) -> float:
    return round(size / 2**30, 1)
