"""Latents for other programs: safetensors files, WebDataset shards, and ComfyUI's ``.latent``."""

import io
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from latentdm.batch import CAPTION, LATENTS, MASK, MASKED_LATENTS
from latentdm.cache.jobs import Jobs, StreamJobs
from latentdm.cache.rows import CACHED, MOMENTS, SIZES, CachedSample, packed
from latentdm.data.dataset import PixelDataset, Sample
from latentdm.data.latents import CACHED_COLUMNS, COLUMNS
from latentdm.data.skips import SampleError
from latentdm.data.stream import StreamImages

SAMPLES_A_SHARD = 2000


def export(datasets: Sequence[PixelDataset], kind: str, folder: Path) -> dict[str, int]:
    """Write the latents of some data sets as files.

    Args:
        datasets: that look up.
        kind: a key of `WRITERS`.
        folder: where to; made if need be.

    Returns:
        ``entries`` and ``bytes`` written, and ``misses``: images that the cache lacks or that cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = {"entries": 0, "bytes": 0, "misses": 0}
    write = WRITERS[kind]
    for size in write(_samples(datasets, found), folder):
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


def _safetensors(samples: Iterator[tuple[str, Sample]], folder: Path) -> Iterator[int]:
    for stem, sample in samples:
        yield _write(folder / f"{stem}.safetensors", _content(sample))


def _content(sample: Sample) -> bytes:
    return save(tensors_of(sample), {COLUMNS: json.dumps(columns_of(sample), default=str)})


def _webdataset(samples: Iterator[tuple[str, Sample]], folder: Path) -> Iterator[int]:
    shard: tarfile.TarFile | None = None
    for number, (stem, sample) in enumerate(samples):
        if number % SAMPLES_A_SHARD == 0:
            if shard is not None:
                shard.close()
            shard = tarfile.open(folder / f"latents-{number // SAMPLES_A_SHARD:06}.tar", "w")  # noqa: SIM115
        assert shard is not None
        key = stem.replace(".", "_")  # what follows a dot is the kind of a file there
        content = _content(sample)
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
    if shard is not None:
        shard.close()


def _comfyui(samples: Iterator[tuple[str, Sample]], folder: Path) -> Iterator[int]:
    """As ComfyUI's node writes them: one latent before any scaling, the mean, as nodes that encode give none else."""
    for stem, sample in samples:
        mean = sample[CACHED].found[LATENTS][MOMENTS][0]
        tensors = {"latent_tensor": mean[None].float().contiguous(), "latent_format_version_0": torch.zeros(0)}
        columns = columns_of(sample) | {CACHED_COLUMNS: sample[CACHED].found[LATENTS][SIZES].tolist()}
        content = save(tensors, {COLUMNS: json.dumps(columns, default=str)})
        yield _write(folder / f"{stem}.latent", content)


def _write(path: Path, content: bytes) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return len(content)


WRITERS: dict[str, Callable[[Iterator[tuple[str, Sample]], Path], Iterator[int]]] = {
    "safetensors": _safetensors,
    "webdataset": _webdataset,
    "comfyui": _comfyui,
}
"""Kind → what writes it."""
