"""`Compilation`: the encoder of an autoencoder under ``torch.compile``, in one graph for each shape of a chunk."""

import inspect
import warnings
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from latentdm.errors import UserError
from latentdm.frozen.chunks import is_out_of_memory, sides

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
"""What torch.compile calls its modes; the second and third replay CUDA graphs."""

SHAPES = 256
"""How many shapes of a chunk may be compiled: torch's own limit of eight is soon reached with aspect buckets."""


class Compilation:
    """Compiles ``autoencoder.encoder`` in its place, state-dict keys kept, and falls back to eager with a warning.

    Shapes are never made dynamic: the first chunk of each shape compiles, which is said before and, with its
    time, after it, and no chunk after that.

    Args:
        autoencoder: one with an ``encoder``.
        mode: one of torch.compile's.
    """

    def __init__(self, autoencoder: nn.Module, mode: str) -> None:
        self._encoder: nn.Module = autoencoder.encoder  # type: ignore[assignment]
        self.replays = mode in ("reduce-overhead", "max-autotune")
        """Whether CUDA graphs may run, which overwrite the last chunk's output."""
        self._seen: set[tuple[Any, ...]] = set()
        self._eager = False
        limit = {"recompile_limit": SHAPES} if "recompile_limit" in inspect.signature(torch.compile).parameters else {}
        self._encoder.compile(dynamic=False, mode=None if mode == "default" else mode, **limit)

    def encode(self, autoencoder: Any, images: Tensor) -> Any:
        """``autoencoder.encode(images)``, compiled where that works.

        Raises:
            torch.OutOfMemoryError: memory ran out while it compiled.
        """
        from torch._dynamo.exc import TorchDynamoException

        if self._eager:
            return autoencoder.encode(images)
        shape = (images.shape, images.dtype, images.device)
        first = shape not in self._seen
        if first:
            self._seen.add(shape)
            _say(f"FrozenVAE: compiling for {sides(images.shape)}, once; this may take minutes")
        began = perf_counter()
        try:
            if self.replays and images.device.type == "cuda":
                torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            output = autoencoder.encode(images)
        except TorchDynamoException as error:
            cause = getattr(error, "inner_exception", error)
            if is_out_of_memory(cause):
                self._seen.discard(shape)
                raise torch.OutOfMemoryError(str(cause)) from None
            self._eager = True
            self._encoder._compiled_call_impl = None  # what .compile() sets; torch has no public way back
            reason = " ".join(str(error).split())[:200]
            warnings.warn(
                f"FrozenVAE: compile has no effect, as torch.compile failed: {reason} The autoencoder runs eagerly; "
                "install a C++ compiler, or set compile: false",
                stacklevel=2,
            )
        if self._eager:  # outside of the handler, whose traceback would keep tensors alive
            return autoencoder.encode(images)
        if first:
            _say(f"FrozenVAE: compiled for {sides(images.shape)} and encoded, in {perf_counter() - began:.1f} s")
        return output


def _say(text: str) -> None:
    """Where a user sees it without setting up any logging; late, since most never compile."""
    from lightning.pytorch.utilities import rank_zero_info

    rank_zero_info(text)


def compile_mode(setting: bool | str, autoencoder: nn.Module, frame_axis: bool, tiling: str) -> str | None:
    """The mode of torch.compile that a setting asks for, or None, with a warning where it can have no effect.

    Raises:
        ValueError: it is neither a bool nor one of torch's modes.
    """
    if setting is False:
        return None
    if setting is not True and setting not in MODES:
        raise UserError(f"FrozenVAE: compile must be true, false or one of {', '.join(MODES)}, got {setting!r}")
    name = type(autoencoder).__name__
    if not isinstance(getattr(autoencoder, "encoder", None), nn.Module):
        hindrance = f"{name} has no encoder of its own"
    elif frame_axis:
        hindrance = f"the encoder of {name} keeps a cache between frames"
    elif tiling == "always":
        hindrance = "tiles at the borders have shapes of their own"
    else:
        return "default" if setting is True else setting
    warnings.warn(f"FrozenVAE: compile={setting} has no effect: {hindrance}; set it to false", stacklevel=3)
    return None
