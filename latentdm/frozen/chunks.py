"""How many images go through an autoencoder at once, and what happens when memory runs out."""

import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
from tqdm.auto import tqdm

from latentdm.errors import UserError
from latentdm.frozen.allocator import keep_freed, keeps_freed
from latentdm.frozen.contexts import NOTHING
from latentdm.tensors import dtype_name
from latentdm.validation import Check

TILINGS = ("never", "last_resort", "always")

_DRIVERS_SAY = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")

KEPT_BYTES, CACHE_BYTES = 64 * 2**20, 8 * 2**20
"""The widest layer of a chunk on a CPU, where freed memory is kept for the next layer, and where it is not.

Measured at 128², 256² and 512² for 1, 2, 4, 8 and 16 images, in float32 and bfloat16: with memory that is kept, more
images at once are a little faster or as fast, and take more memory; with memory that is not, the page faults make two
to four times slower what is larger than a core's cache.
"""

MAX_IMAGES_ON_CPU = 16
"""Beyond this many images, a pass costs next to nothing beside its arithmetic."""

T = TypeVar("T")

Encode = Callable[[slice, int, bool], T]
"""Encodes the rows of a chunk, given how many images to pad it to and whether to tile."""


class ImageTooLarge(UserError, torch.OutOfMemoryError):
    """Not even one image fits in memory."""


class Chunks:
    """Runs rows through an autoencoder a chunk at a time. Out of memory, and only that, makes the chunks smaller.

    Args:
        tiling: ``"never"``, ``"last_resort"`` (when not even one image fits) or ``"always"``.
        fixed: keep to few chunk sizes for each size of image, as a compiled autoencoder wants it: a smaller batch is
            padded to a size that there was, and only a larger one makes a new size.
        owner: the autoencoder's class, for messages.

    Raises:
        ValueError: an unknown tiling.

    Attributes:
        count: chunks that went through so far.
        retries: how often a chunk was run again, smaller or tiled, because memory ran out.
    """

    def __init__(self, tiling: str, fixed: bool, owner: str) -> None:
        self.tiling = Check("FrozenVAE").choice("tiling", tiling, TILINGS)
        self.fixed = fixed
        self.owner = owner
        self.count = 0
        self.retries = 0
        self._limits: dict[Hashable, int] = {}
        """Image shape and dtype → images that fit; 0: not one, unless it is tiled."""
        self._sizes: dict[Hashable, set[int]] = {}
        """Of the chunks so far, where they are fixed."""
        self._planned: dict[Hashable, int | None] = {}
        """Kind of batch → its `size`, which is computed once: a small batch feels each calculation."""

    def best(self, device: torch.device, image_bytes: int) -> int | None:
        """How many images to encode at once where nobody says; None: all of a batch, as where sizes are fixed.

        An accelerator is faster the more it is given. A CPU gains little from more images at once, and where freed
        memory goes back to the system (`keep_freed`), it is up to four times faster with few.

        Args:
            device: where they are encoded.
            image_bytes: of the widest layer's activations, for one image.
        """
        if self.fixed or device.type != "cpu":
            return None
        widest = KEPT_BYTES if keeps_freed() else CACHE_BYTES
        return max(1, min(MAX_IMAGES_ON_CPU, widest // max(1, image_bytes)))

    def size(
        self,
        count: int,
        shape: Sequence[int],
        per_batch: int | None,
        device: torch.device,
        activation_bytes: Callable[[Sequence[int]], int],
    ) -> int | None:
        """``per_batch``, or the best for ``count`` images of ``shape``. A CPU's allocator is made ready for them."""
        kind = count, shape, per_batch, device
        if kind not in self._planned:
            image_bytes = activation_bytes(shape)
            self._planned[kind] = size = per_batch or self.best(device, image_bytes)
            if device.type == "cpu":
                keep_freed(2 * min(size or count, count) * image_bytes)  # the largest buffer of a convolution
        return self._planned[kind]

    def run(
        self,
        encode: Encode[T],
        rows: int,
        per_batch: int | None,
        shape: Sequence[int],
        dtype: torch.dtype,
        progress: bool = False,
    ) -> list[T]:
        """Encode all rows, in order.

        Args:
            encode: encodes a chunk.
            rows: how many there are.
            per_batch: at most so many at once; None: all.
            shape: ``c h w`` of an image, on which with ``dtype`` a limit is remembered.
            dtype: what the autoencoder computes in.
            progress: show a bar when the call lasts longer than two seconds.

        Raises:
            torch.OutOfMemoryError: not even one image fits; it names the resolution, the need and the remedies.
        """
        key = (shape, dtype)
        size, tiled = self._start(key, rows, per_batch)
        limit, done = self._limits.get(key), 0
        encoded: list[T] = []
        shown: Any = tqdm(total=rows, desc="encode", unit="image", delay=2, leave=False) if progress else NOTHING
        with shown as bar:
            while done < rows:
                chunk = slice(done, min(done + size, rows))
                images = size if self.fixed else chunk.stop - chunk.start
                failure = None
                try:
                    encoded.append(encode(chunk, images, tiled))
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    failure = " ".join(str(error).split())
                if failure is not None:  # outside of the handler, whose traceback would keep the tensors alive
                    if torch.cuda.is_available():
                        torch.cuda.empty_cache()
                    if images == 1 and (tiled or self.tiling == "never"):
                        raise ImageTooLarge(self._hopeless(shape, dtype, tiled, failure))
                    self.retries += 1
                    size, tiled = max(1, images // 2), tiled or images == 1
                    self._limits[key] = 0 if tiled and self.tiling == "last_resort" else size
                    continue
                self.count += 1
                done = chunk.stop
                if bar is not None:
                    bar.update(chunk.stop - chunk.start)
        if self._limits.get(key) != limit:
            self._say(key, size, tiled)
        return encoded

    def _start(self, key: Hashable, rows: int, per_batch: int | None) -> tuple[int, bool]:
        """Images in a chunk, and whether they are tiled."""
        size = min(per_batch or rows, rows)
        if self.fixed:
            sizes = self._sizes.setdefault((key, per_batch), set())
            size = min((known for known in sizes if known >= size), default=size)
            sizes.add(size)
        limit = self._limits.get(key, size)
        return max(1, min(size, limit)), self.tiling == "always" or limit == 0

    def _say(self, key: tuple[Sequence[int], torch.dtype], size: int, tiled: bool) -> None:
        shape, dtype = key
        images = f"images of {sides(shape)} in {dtype_name(dtype)}"
        if tiled and self.tiling == "last_resort":
            text = (
                f"out of memory with a single one of the {images}: they are tiled from now on (tiling=last_resort), "
                "which changes their latents"
            )
        else:
            text = f"out of memory: {images} are encoded {size} at a time from now on; set per_batch={size}"
        warnings.warn(f"FrozenVAE: {text}", stacklevel=4)

    def _hopeless(self, shape: Sequence[int], dtype: torch.dtype, tiled: bool, failure: str) -> str:
        remedies = ["smaller images"]
        if dtype == torch.float32:
            remedies.append("dtype=bfloat16")
        if not tiled:
            remedies.append("tiling=last_resort (which changes the latents)")
        return (
            f"FrozenVAE: not even one image of {sides(shape)} fits in memory for {self.owner} in {dtype_name(dtype)}"
            f"{', tiled' if tiled else ''}; use {' or '.join(remedies)}, or leave the autoencoder more room. "
            f"What it needed: {failure}"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, and nothing else.

    The allocator of the CPU, the CUDA driver and its libraries raise a plain RuntimeError, known by its text alone.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    if "DefaultCPUAllocator" in text:
        return "can't allocate memory" in text or "not enough memory" in text
    return any(said in text for said in _DRIVERS_SAY)


def sides(shape: Sequence[int]) -> str:
    """A shape as messages name it: ``3×512×512``."""
    return "×".join(str(side) for side in shape)
