"""Latents that were exported, read back without any image."""

import json
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load
from torch import Tensor

from latentdm.batch import CROP_TOP_LEFT, LATENTS, ORIGINAL_SIZE, TARGET_SIZE
from latentdm.cache.rows import CACHED, MOMENTS, NO_SIZES, SIZES, CachedSample
from latentdm.data.dataset import PixelDataset, Sample
from latentdm.data.files import open_file
from latentdm.data.index import unit_hash
from latentdm.data.listing import existing_folder, list_files
from latentdm.data.module import PixelDataModule
from latentdm.data.pairing import check_val_share, split_hashes
from latentdm.data.skips import SampleError
from latentdm.errors import UserError, attributed
from latentdm.validation import Check

OWNER = "LatentsData"

COLUMNS = "columns"
"""Of a file's metadata: all that is known of the sample, as JSON."""

CACHED_COLUMNS = "cached_sizes"

ENDINGS = (".safetensors", ".latent")

SIZE_COLUMNS = (ORIGINAL_SIZE, CROP_TOP_LEFT, TARGET_SIZE)


@dataclass(frozen=True)
class File:
    """A sample's file, by itself or inside a tar.

    Attributes:
        path: of the file or the tar.
        name: what a person calls it.
        offset: where it begins.
        size: its bytes; −1: all there are.
    """

    path: Path
    name: str
    offset: int = 0
    size: int = -1

    def read(self) -> bytes:
        """Its content."""
        with open_file(self.path) as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(eq=False)
class Latents(PixelDataset):
    """Some exported samples.

    Attributes:
        files: all of them.
        rows: ``n``: those that belong here.
    """

    files: Sequence[File]
    rows: npt.NDArray[np.int64]

    owner = OWNER

    def __len__(self) -> int:
        """The number of samples."""
        return len(self.rows)

    def name(self, position: int) -> str:
        """The file."""
        return self.files[int(self.rows[position])].name

    def sample(self, position: int, epoch: int) -> Sample:
        """The sample's columns, and its latents as an encoder reads them from a cache.

        Raises:
            SampleError: the file holds no latents.
        """
        row = int(self.rows[position])
        file = self.files[row]
        try:
            content = file.read()
            tensors = load(content)
            head = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            columns: dict[str, Any] = json.loads(head.get("__metadata__", {}).get(COLUMNS, "{}"))
        except Exception as error:  # a broken file makes its readers raise nearly anything
            raise SampleError(f"cannot read {file.name}: {error}; export it again, or remove the file") from error
        found = _entries(tensors, file, columns)
        sizes = tuple(found[LATENTS][SIZES].tolist())
        sample: Sample = columns | {"index": row, "name": columns.get("name", file.name)}
        for name in SIZE_COLUMNS:
            if name in sample:
                sample[name] = torch.tensor(sample[name])
        keys = {name: f"{file.path}/{file.offset}/{name}".encode() for name in found}
        return sample | {CACHED: CachedSample(keys, found, sizes)}


def _entries(tensors: dict[str, Tensor], file: File, columns: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    """Output → its entry; ComfyUI's files hold one latent of one image."""
    if "latent_tensor" in tensors:
        scale = 1.0 if "latent_format_version_0" in tensors else 1 / 0.18215  # as its loader has it
        mean = tensors["latent_tensor"].float() * scale
        if mean.ndim != 4 or len(mean) != 1:
            raise SampleError(
                f"{file.name} holds latents of shape {tuple(mean.shape)}; only those of one image are read"
            )
        sizes = columns.pop(CACHED_COLUMNS, None) or (*NO_SIZES, mean.shape[-2] * 8, mean.shape[-1] * 8)
        return {LATENTS: {MOMENTS: mean, SIZES: torch.tensor(sizes, dtype=torch.int32)}}
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        output, dot, field = name.partition(".")
        if dot:
            found.setdefault(output, {})[field] = tensor
    if LATENTS not in found or not {MOMENTS, SIZES} <= found[LATENTS].keys():
        raise SampleError(f"{file.name} holds no latents, but {', '.join(tensors) or 'nothing'}; export it again")
    return found


class LatentsData(PixelDataModule):
    """Latents that ``latentdm cache export`` wrote, or ComfyUI: nothing is decoded and nothing encoded.

    The encoder draws from their moments as it draws from those that it makes itself, and scales them; it must be of the
    autoencoder that made them.

    Args:
        root: a folder with ``.safetensors`` or ``.latent`` files, or with WebDataset shards (``.tar``) of latents.
        size: the longer side of the images in pixels; latents of others are left out. None takes all.
        batch_size: images a batch, on each device. Latents of one size make a batch.
        val_share: share of the images that validate; a hash of its name decides for each.
        num_workers: processes that read.
        seed: the order follows from it.
        on_error: ``"raise"`` or ``"skip"``, see `latentdm.data.PixelDataModule`.
        max_skipped_share: the share of broken samples that ``skip`` bears.

    Raises:
        UserError: a setting is out of range or the folder is missing; in ``setup``: it holds no latents.
    """

    def __init__(
        self,
        root: str | Path,
        size: int | None = None,
        batch_size: int = 16,
        val_share: float = 0.1,
        num_workers: int = 0,
        seed: int = 0,
        on_error: str = "raise",
        max_skipped_share: float = 0.05,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, on_error, max_skipped_share)
        with attributed(OWNER):
            self.root = existing_folder("root", root, "what latentdm cache export wrote")
        self._problems: list[str] = []
        self.size = None if size is None else Check(OWNER).integer("size", size, 1)
        self.val_share = check_val_share(Check(OWNER), val_share)

    def setup(self, stage: str | None = None) -> None:
        """List the files, and set the datasets, whatever the stage."""
        listing = list_files(self.root)
        self._problems = listing.problems
        if self._problems and self.on_error == "raise":
            raise UserError(f"{OWNER}: {self._problems[0]}")
        files, shapes = [], []
        for file in _files(self.root, sorted(listing.others, key=lambda name: name.split("/"))):
            shape, side = _shape(file)
            if self.size is None or side in (self.size, None):  # what cannot be read says so when it is
                files.append(file)
                shapes.append(shape)
        if not files:
            of_size = "" if self.size is None else f" of size={self.size}"
            raise UserError(
                f"{OWNER}: root={str(self.root)!r} holds no {' or '.join(ENDINGS)} files{of_size}, and no tar shards "
                "of them"
            )
        hashes = np.array([unit_hash(file.name) for file in files])
        train, val = split_hashes(hashes, self.val_share)
        buckets = {shape: number for number, shape in enumerate(sorted(set(shapes)))}
        bucket_of = np.array([buckets[shape] for shape in shapes], np.int32)

        def some(rows: npt.NDArray[np.int64]) -> Latents:
            latents = Latents(files, rows)
            latents.bucket_of = bucket_of[rows] if len(buckets) > 1 else None
            return latents

        self.train_set = some(train)
        self.val_set = self.test_set = some(val) if len(val) else None
        self.predict_set = some(np.arange(len(files)))

    def problems(self) -> list[str]:
        """Folders that cannot be listed."""
        return self._problems


def _files(root: Path, names: Iterable[str]) -> Iterator[File]:
    for name in names:
        path = root / name
        if path.suffix in ENDINGS:
            yield File(path, name)
        elif path.suffix == ".tar":
            with open_file(path) as opened, tarfile.open(fileobj=opened) as tar:
                for member in tar:
                    if member.isfile() and member.name.endswith(ENDINGS):
                        yield File(path, member.name, member.offset_data, member.size)


def _shape(file: File) -> tuple[tuple[int, ...], int | None]:
    """``h w`` of the latents and the longer side of their image, from a file's head; () and None without one."""
    try:
        with open_file(file.path) as opened:
            opened.seek(file.offset)
            length = int.from_bytes(opened.read(8), "little")
            head = json.loads(opened.read(min(length, 1 << 20)))
        shape = tuple((head.get(f"{LATENTS}.{MOMENTS}") or head["latent_tensor"])["shape"][-2:])
        columns = json.loads(head.get("__metadata__", {}).get(COLUMNS, "{}"))
        return shape, max(columns.get(TARGET_SIZE) or [8 * side for side in shape])
    except (OSError, KeyError, TypeError, ValueError):
        return (), None
