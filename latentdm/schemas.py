"""Schemas of the config groups: a typo or a wrong type fails when Hydra composes, and the error names the key.

A schema is a dataclass whose fields are the parameters of a class: ``/latentdm/schema/masks/RandomMask`` is that of
``latentdm.masks.RandomMask``. Hydra imports this module before it composes, so it must stay cheap: the parameters come
from `latentdm.signatures` and not from the classes, which import torch.
"""

from copy import deepcopy
from dataclasses import field, make_dataclass
from functools import partial
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from latentdm.signatures import SIGNATURES


def register_schemas() -> None:
    """Put the schemas into Hydra's store, under a group that carries the library's name."""
    store = ConfigStore.instance()
    for path, parameters in SIGNATURES.items():
        group, _, name = f"latentdm/schema/{path}".rpartition("/")
        store.store(group=group, name=name, node=_schema(path, parameters), provider="latentdm")


def output_dir() -> str:
    """The folder of Hydra's run, as ``${latentdm.output_dir:}``; ``outputs`` where no app runs, as in a notebook."""
    if not HydraConfig.initialized() or OmegaConf.is_missing(HydraConfig.get().runtime, "output_dir"):
        return "outputs"
    return str(HydraConfig.get().runtime.output_dir)


# Here and not where groups are searched: a pickled config, which resolves in another process, finds this module alone.
OmegaConf.register_new_resolver("latentdm.output_dir", output_dir, replace=True)


def _schema(path: str, parameters: dict[str, tuple[Any, Any]]) -> type:
    target: dict[str, tuple[Any, Any]] = {"_target_": (str, f"latentdm.{path.replace('/', '.')}")}
    fields = [
        (name, kind, field(default_factory=partial(deepcopy, default)))
        for name, (kind, default) in (target | parameters).items()
    ]
    schema = make_dataclass(path.replace("/", "."), fields)  # the name that errors show
    # A pickled config (a sweep's job, a checkpoint) finds its schemas by their names in this module.
    schema.__module__, schema.__qualname__ = __name__, path.replace("/", "_")
    globals()[schema.__qualname__] = schema
    return schema
