"""What a fine-tune leaves behind: a pipeline's folder, or a LoRA's file, whole or not at all."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from torch import Tensor

from latentdm.finetune.base import FineTune
from latentdm.finetune.lora import adapter_metadata, adapter_weights, kohya_weights
from latentdm.finetune.sharding import assembled
from latentdm.pipelines import INDEX, PipelineSource

LORA_FILE = "pytorch_lora_weights.safetensors"
KOHYA_FILE = "lora_kohya.safetensors"


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A temporary folder beside ``folder`` that takes its name when all is written; after an error it is gone."""
    temporary = folder.with_name(f".{folder.name}-{uuid4().hex}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        old = temporary.with_name(f"{temporary.name}-old")
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_pipeline(folder: Path, model: FineTune, state: dict[str, Tensor] | None, previous: Path | None) -> None:
    """Write a pipeline: the trained component, and all others as they were.

    Args:
        folder: an empty one.
        model: whose denoiser was trained.
        state: the denoiser's weights, where its own are split over ranks.
        previous: a folder that an earlier call wrote, whose unchanged files are linked instead of copied.
    """
    component, pipeline = model.component, model.pipeline
    network = assembled(model.network, model.network_class, state)
    network.save_pretrained(folder / component)
    index = dict(pipeline.index) | {"_class_name": model.pipeline_class}
    index[component] = ["diffusers", type(network).__name__]
    source = previous if previous is not None and (previous / INDEX).exists() else _local(pipeline)
    copy = _link if source == previous else shutil.copy2
    for name in pipeline.components:
        if name != component and (source / name).is_dir():
            (folder / name).mkdir()
            for file in _chosen(source / name, pipeline.variant):
                target = folder / name / file.name.replace(f".{pipeline.variant}.", ".")
                copy(file, target)
                if target.name.endswith(".index.json") and target.name != file.name:  # it names files of the variant
                    text = file.read_text(encoding="utf-8").replace(f".{pipeline.variant}.", ".")
                    target.write_text(text, encoding="utf-8")
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_lora(folder: Path, model: FineTune, state: dict[str, Tensor] | None, kohya: bool) -> None:
    """Write a LoRA in diffusers' format with its adapter's settings and, if asked for, in kohya's beside it.

    Args:
        folder: an empty one.
        model: whose denoiser has an adapter.
        state: the denoiser's weights, where its own are split over ranks.
        kohya: also write ``lora_kohya.safetensors``, which ComfyUI reads.
    """
    from diffusers.loaders.lora_pipeline import FluxLoraLoaderMixin, StableDiffusionLoraLoaderMixin
    from safetensors.torch import save_file

    component, network = model.component, model.network
    loader: Any = StableDiffusionLoraLoaderMixin if component == "unet" else FluxLoraLoaderMixin
    settings = {
        f"{component}_lora_layers": adapter_weights(network, state),
        f"{component}_lora_adapter_metadata": adapter_metadata(network),
    }
    loader.save_lora_weights(folder, weight_name=LORA_FILE, **settings)
    if kohya:
        save_file(kohya_weights(network, state), folder / KOHYA_FILE, metadata={"format": "pt"})


def _local(pipeline: PipelineSource) -> Path:
    """The folder of a pipeline; of a hub repository that of the cache, downloaded if it is not there."""
    if pipeline.folder is not None:
        return pipeline.folder
    from diffusers import DiffusionPipeline

    return Path(DiffusionPipeline.download(pipeline.source, revision=pipeline.revision, variant=pipeline.variant))


def _chosen(folder: Path, variant: str | None) -> list[Path]:
    """The files of a component: of weights in several variants the one that is asked for, safe before pickled."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    if any(path.suffix == ".safetensors" for path in files):
        files = [path for path in files if path.suffix not in (".bin", ".ckpt", ".msgpack", ".h5")]
    of_variant = [path for path in files if variant is not None and f".{variant}." in path.name]
    weights = (".safetensors", ".bin", ".index.json")
    return [path for path in files if not of_variant or path in of_variant or not path.name.endswith(weights)]


def _link(source: Path, target: Path) -> None:
    """Of a file that this callback wrote itself a second name is as good as a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
