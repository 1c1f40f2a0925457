"""Latents for other programs: safetensors files, WebDataset shards, and ComfyUI's ``.latent``."""

import io
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, count, islice
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from latentdm.batch import CAPTION, LATENTS, MASK, MASKED_LATENTS
from latentdm.cache.rows import CACHED, MOMENTS, SIZES, CachedSample, packed
from latentdm.cache.wanted import Jobs, StreamJobs
from latentdm.data.dataset import PixelDataset, Sample
from latentdm.data.latents import CACHED_COLUMNS, COLUMNS
from latentdm.data.skips import SampleError
from latentdm.data.stream import StreamImages

SAMPLES_A_SHARD = 2000


def export(datasets: Sequence[PixelDataset], kind: str, folder: Path) -> dict[str, int]:
    """Write the latents of some data sets as files.

    Args:
        datasets: that look up.
        kind: ``"safetensors"``, ``"webdataset"`` or ``"comfyui"``.
        folder: where to; made if need be.

    Returns:
        ``entries`` and ``bytes`` written, and ``misses``: images that the cache lacks or that cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = {"entries": 0, "bytes": 0, "misses": 0}
    samples = _samples(datasets, found)
    for size in _write_shards(samples, folder) if kind == "webdataset" else _write_files(samples, folder, kind):
        found["entries"] += 1
        found["bytes"] += size
    return found


def _samples(datasets: Sequence[PixelDataset], found: dict[str, int]) -> Iterator[tuple[str, Sample]]:
    """A file's name without its ending, which comes once; and the sample."""
    names: dict[str, int] = {}
    for sample in tqdm(_every(datasets), "exporting", unit=" images", delay=1):
        cached: CachedSample | None = None if sample is None else sample[CACHED]
        if sample is None or cached is None or len(cached.found) < len(cached.keys):
            found["misses"] += 1
            continue
        stem = str(PurePosixPath(str(sample["name"])).with_suffix("")).lstrip("/").replace("..", "_")
        number = names[stem] = names.get(stem, -1) + 1  # crops and sides of an image have one name
        yield (f"{stem}.{number}" if number else stem), sample


def _every(datasets: Sequence[PixelDataset]) -> Iterator[Sample | None]:
    """The samples; None for one that cannot be read."""
    streams = [dataset for dataset in datasets if isinstance(dataset, StreamImages)]
    jobs = Jobs([dataset for dataset in datasets if not isinstance(dataset, StreamImages)])
    for position in range(len(jobs)):
        try:
            yield jobs.sample(position, 0)
        except SampleError:
            yield None
    yield from StreamJobs(streams)


def tensors_of(sample: Sample) -> dict[str, Tensor]:
    """``latents.moments`` and so on: the fields of a sample's entries."""
    cached: CachedSample = sample[CACHED]
    fields = {f"{name}.{field}": value for name, entry in cached.found.items() for field, value in entry.items()}
    if MASKED_LATENTS in cached.found and isinstance(sample.get(MASK), Tensor):
        fields[f"{MASKED_LATENTS}.{MASK}"] = packed(sample[MASK][None] > 0)[0]
    return {name: value.contiguous() for name, value in fields.items()}


def columns_of(sample: Sample) -> dict[str, Any]:
    """What else there is of a sample, as JSON."""
    columns = {name: value for name, value in sample.items() if name not in (CACHED, MASK)}
    return {name: value.tolist() if isinstance(value, Tensor) else value for name, value in columns.items()}


def _safetensors(sample: Sample) -> bytes:
    return save(tensors_of(sample), {COLUMNS: json.dumps(columns_of(sample), default=str)})


def _comfyui(sample: Sample) -> bytes:
    """As ComfyUI's node writes them: one latent before any scaling, the mean, as nodes that encode give none else."""
    entry = sample[CACHED].found[LATENTS]
    tensors = {"latent_tensor": entry[MOMENTS][:1].float().contiguous(), "latent_format_version_0": torch.zeros(0)}
    columns = columns_of(sample) | {CACHED_COLUMNS: entry[SIZES].tolist()}
    return save(tensors, {COLUMNS: json.dumps(columns, default=str)})


FILES: dict[str, tuple[str, Callable[[Sample], bytes]]] = {
    "safetensors": (".safetensors", _safetensors),
    "comfyui": (".latent", _comfyui),
}
"""Kind → the ending and the content of a sample's file."""


def _write_files(samples: Iterator[tuple[str, Sample]], folder: Path, kind: str) -> Iterator[int]:
    ending, content_of = FILES[kind]
    for stem, sample in samples:
        path = folder / f"{stem}{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        yield path.write_bytes(content_of(sample))


def _write_shards(samples: Iterator[tuple[str, Sample]], folder: Path) -> Iterator[int]:
    """WebDataset's: tar files of a fixed number of samples."""
    for number in count():
        first = next(samples, None)
        if first is None:
            return
        with tarfile.open(folder / f"latents-{number:06}.tar", "w") as shard:
            for stem, sample in chain([first], islice(samples, SAMPLES_A_SHARD - 1)):
                key = stem.replace(".", "_")  # what follows a dot is the kind of a file there
                content = _safetensors(sample)
                files: Mapping[str, bytes] = {
                    "safetensors": content,
                    "json": json.dumps(columns_of(sample), default=str).encode(),
                    **({"txt": str(sample[CAPTION]).encode()} if CAPTION in sample else {}),
                }
                for ending, data in files.items():
                    info = tarfile.TarInfo(f"{key}.{ending}")
                    info.size = len(data)
                    shard.addfile(info, io.BytesIO(data))
                yield len(content)
