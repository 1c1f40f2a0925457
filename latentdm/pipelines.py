"""A diffusers pipeline in a folder or on a hub: its parts and their classes, before any of them is loaded."""

from collections.abc import Mapping
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

from latentdm.errors import UserError

INDEX = "model_index.json"


class PipelineSource:
    """Reads the small files of a pipeline: ``model_index.json`` and the configs of its components.

    Args:
        owner: the class that an error names.
        source: a folder written by ``save_pretrained``, or a hub id.
        revision: of a hub repository.
        variant: of the weights' files, such as ``"fp16"``.

    Raises:
        UserError: nothing is there.

    Example:
        >>> pipeline = PipelineSource("FluxFill", "black-forest-labs/FLUX.1-Fill-dev")  # doctest: +SKIP
        >>> pipeline.class_name("transformer")  # doctest: +SKIP
        'FluxTransformer2DModel'
    """

    def __init__(
        self, owner: str, source: str | PathLike[str], revision: str | None = None, variant: str | None = None
    ) -> None:
        self.owner = owner
        self.source = str(source)
        self.revision = revision
        self.variant = variant
        self.index: Mapping[str, Any] = self._read_index()

    @property
    def folder(self) -> Path | None:
        """Where it lies; None for a hub id."""
        path = Path(self.source)
        return path if path.is_dir() else None

    @property
    def pipeline_class(self) -> str:
        """The class that the index names."""
        return str(self.index.get("_class_name", ""))

    @cached_property
    def components(self) -> dict[str, str]:
        """Component → class name, of those that the pipeline has."""
        found = {}
        for name, value in self.index.items():
            if isinstance(value, list | tuple) and len(value) == 2 and isinstance(value[1], str):
                found[name] = value[1]
        return found

    def class_name(self, component: str) -> str:
        """The class of a component.

        Raises:
            UserError: the pipeline has no such component, or its folder is gone.
        """
        if component not in self.components:
            raise self._missing(component, f"its components are {', '.join(sorted(self.components))}")
        if self.folder is not None and not (self.folder / component).is_dir():
            raise self._missing(component, f"{INDEX} names it, but the folder {component}/ is not there")
        return self.components[component]

    def config(self, component: str) -> Mapping[str, Any]:
        """The config of a diffusers model or scheduler, without its weights."""
        from diffusers.configuration_utils import ConfigMixin

        self.class_name(component)
        reader: Any = type("Reader", (ConfigMixin,), {"config_name": _config_name(component)})
        try:
            config = reader.load_config(self.source, subfolder=component, revision=self.revision)
        except OSError as error:
            raise self._missing(component, _one_line(error)) from error
        return config  # type: ignore[no-any-return]

    def load(self, module: Any, component: str, **settings: Any) -> Any:
        """Load a component with its weights.

        Args:
            module: the library that has its class: diffusers or transformers.
            component: its name.
            settings: of the class's ``from_pretrained``; ``variant`` is this one's unless told.

        Raises:
            UserError: the class is unknown to the library, or there are no weights for it.
        """
        name = self.class_name(component)
        found = getattr(module, name, None)
        if found is None:
            raise UserError(
                f"{self.owner}: {self.source!r}: {component} is a {name}, which {module.__name__} "
                f"{module.__version__} does not have; update it: pip install -U {module.__name__}"
            )
        if settings.setdefault("variant", self.variant) is None:  # some tokenizers would keep it
            del settings["variant"]
        try:
            return found.from_pretrained(self.source, subfolder=component, revision=self.revision, **settings)
        except OSError as error:
            given = settings.get("variant")
            advice = (
                "If its files are named as in model.fp16.safetensors, set variant: fp16"
                if given is None
                else f"It may have no files of variant={given!r}: leave variant out"
            )
            raise self._missing(component, f"{_one_line(error)} {advice}") from error

    def _read_index(self) -> Mapping[str, Any]:
        from diffusers import DiffusionPipeline

        if self.source.endswith((".safetensors", ".ckpt")):
            raise UserError(
                f"{self.owner}: {self.source!r} is a single file; give a pipeline folder. diffusers makes one of it: "
                "StableDiffusionPipeline.from_single_file(…).save_pretrained(folder)"
            )
        try:
            index: Mapping[str, Any] = DiffusionPipeline.load_config(self.source, revision=self.revision)
        except OSError as error:
            where = (
                f"the folder has no {INDEX}"
                if self.folder is not None
                else "there is no such folder here, and the hub gave nothing: offline and not in its cache, a "
                "repository that wants a login (hf auth login), or a wrong id"
            )
            raise UserError(
                f"{self.owner}: no pipeline at {self.source!r}: {where}; "
                "give a hub id or a folder that a pipeline's save_pretrained wrote"
            ) from error
        return index

    def _missing(self, component: str, why: str) -> UserError:
        return UserError(f"{self.owner}: the pipeline {self.source!r} ({self.pipeline_class}) lacks {component}: {why}")


def _config_name(component: str) -> str:
    return "scheduler_config.json" if component == "scheduler" else "config.json"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
