"""What ``save_pretrained`` wrote into a folder or onto a hub: a pipeline's parts, and weights that are loaded whole."""

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from latentdm.errors import UserError

INDEX = "model_index.json"
NOT_FOUND = (
    "there is no such folder here, and the hub gave nothing: offline and not in its cache, a repository that wants a "
    "login (hf auth login), or a wrong id"
)
"""What diffusers says of a hub that it cannot reach sounds like a wrong id."""


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
            raise UserError(
                f"{self.owner}: the pipeline {self.source!r} ({self.pipeline_class}) has no {component}; its "
                f"components are {', '.join(sorted(self.components))}"
            )
        if self.folder is not None and not (self.folder / component).is_dir():
            raise self._missing(component, f"{INDEX} names it, but the folder {component}/ is not there")
        return self.components[component]

    def config(self, component: str) -> Mapping[str, Any]:
        """The config of a diffusers model or scheduler, without its weights."""
        from diffusers import AutoencoderKL, DDPMScheduler

        self.class_name(component)
        reader: Any = DDPMScheduler if component == "scheduler" else AutoencoderKL  # for the name of its file
        try:
            config = reader.load_config(self.source, subfolder=component, revision=self.revision)
        except OSError as error:
            raise self._missing(component, one_line(error)) from error
        return config  # type: ignore[no-any-return]

    def load(self, module: Any, component: str, **settings: Any) -> Any:
        """Load a component.

        Args:
            module: the library that has its class: diffusers or transformers.
            component: its name.
            settings: of `load_weights`, for a component that has any.

        Raises:
            UserError: the class is unknown to the library, or its files are incomplete.
        """
        name = self.class_name(component)
        found = getattr(module, name, None)
        if found is None:
            raise UserError(
                f"{self.owner}: {self.source!r}: {component} is a {name}, which {module.__name__} "
                f"{module.__version__} does not have; update it: pip install -U {module.__name__}"
            )
        settings |= {"subfolder": component, "revision": self.revision}
        if issubclass(found, nn.Module):
            return load_weights(self.owner, found, self.source, variant=self.variant, **settings)
        try:
            return found.from_pretrained(self.source, **settings)
        except OSError as error:
            raise self._missing(component, one_line(error)) from error

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
            where = f"the folder has no {INDEX}" if self.folder is not None else NOT_FOUND
            raise UserError(
                f"{self.owner}: no pipeline at {self.source!r}: {where}; "
                "give a hub id or a folder that a pipeline's save_pretrained wrote"
            ) from error
        return index

    def _missing(self, component: str, why: str) -> UserError:
        return UserError(f"{self.owner}: the pipeline {self.source!r} ({self.pipeline_class}) lacks {component}: {why}")


def load_weights(
    owner: str,
    model: Any,
    source: str | PathLike[str],
    subfolder: str | None,
    variant: str | None,
    refused: Sequence[str] = ("missing_keys", "mismatched_keys"),
    **settings: Any,
) -> Any:
    """Load a model of diffusers or transformers, which would fill what its weights lack at random.

    Args:
        owner: the class that an error names.
        model: its class.
        source: a folder or a hub id.
        subfolder: where in it.
        variant: of the weights' files, such as ``"fp16"``.
        refused: which keys of the loading info there must be none of.
        settings: others of ``from_pretrained``.

    Raises:
        UserError: there are no weights, or they do not fit the class.
    """
    place = f"{source}/{subfolder}" if subfolder else str(source)
    settings |= {"subfolder": subfolder, "variant": variant, "output_loading_info": True}
    settings["ignore_mismatched_sizes"] = True  # and refuse them below, by their names
    try:
        loaded, info = model.from_pretrained(source, **settings)
    except (OSError, SafetensorError) as error:
        wanted = "" if variant is None else f" with variant={variant!r}"
        advice = (
            "If its files are named as in diffusion_pytorch_model.fp16.safetensors, set variant: fp16"
            if variant is None
            else "It may have no such files: leave variant out"
        )
        if settings.get("use_safetensors"):
            advice += "; if it has only a .bin file and you trust it, use_safetensors: false"
        raise UserError(
            f"{owner}: {place!r} has a config but no weights that can be loaded{wanted}: {one_line(error)} {advice}"
        ) from error
    refuse_keys(owner, place, model, {kind: info.get(kind) or () for kind in refused})
    return loaded


def refuse_keys(owner: str, source: object, model: type, keys: Mapping[str, Collection[Any]]) -> None:
    """Raise UserError if there are any: names of weights by what is wrong with them, such as ``missing_keys``."""
    for kind, names in keys.items():
        if names:
            found = f"{len(names)} {kind.replace('_', ' ')}, the first {min(map(str, names))!r}"
            raise misfit(owner, source, model, found)


def misfit(owner: str, source: object, model: type, what: str) -> UserError:
    """The error that weights do not fit a class, for a caller to raise."""
    return UserError(
        f"{owner}: the weights at {str(source)!r} do not fit {model.__name__}: {what}; save the model again, or name "
        "another source"
    )


def one_line(error: Exception) -> str:
    """What an error says, for use within another's text."""
    return " ".join(str(error).split())
