"""The weights of a frozen module: in which dtype, on which device, in which layout."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from latentdm.frozen.compilation import Compilation
from latentdm.tensors import dtype_name

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Weights:
    """The weights of a frozen autoencoder, as they came and as they compute.

    Args:
        original: the autoencoder. It computes itself where its dtype is what is wanted; else a copy does.
        dtype: a key of `DTYPES`.
        channels_last: whether its layout may be so.
        mode: of torch.compile; None does not compile.

    Attributes:
        original: as it came.
        compilation: of `module`.
        mode: as given.
    """

    def __init__(self, original: nn.Module, dtype: str, channels_last: bool, mode: str | None) -> None:
        self.original = original
        self.compilation: Compilation | None = None
        self._wanted = DTYPES[dtype]
        self._channels_last = channels_last
        self.mode = mode
        self._module: nn.Module | None = None  # made for a device and dtype by `to`
        self._full: nn.Module | None = None
        self._device: torch.device | None = None
        self._rests = False  # on the CPU, until it is needed on its device
        self._first: Tensor | None = None  # to look for it costs as much as all else that a small batch needs

    @property
    def module(self) -> nn.Module:
        """The autoencoder as it computes: on its device, in its dtype and layout."""
        if self._module is None:
            self.to(first_weight(self.original).device)
        elif self._rests:
            self.to(self.device)
        assert self._module is not None
        return self._module

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._device if self._rests and self._device is not None else self.first.device

    def __str__(self) -> str:
        """Dtype and device, as far as they are settled; to ask settles nothing."""
        if self._module is not None:
            return f"{dtype_name(self.first.dtype)} on {self.device}"
        first = first_weight(self.original)
        given = self._wanted if self._wanted or is_of_diffusers(self.original) else first.dtype
        return f"{'dtype=auto' if given is None else dtype_name(given)} on {first.device}"

    @property
    def first(self) -> Tensor:
        """A weight of `module`, for its dtype; to look at it wakes nothing up."""
        if self._first is None:
            self._first = first_weight(self._module or self.module, self._device)
        return self._first

    @property
    def full(self) -> nn.Module:
        """A float32 copy of the weights as they came, on the same device; made when it is first asked for."""
        if self._full is None:
            self._full = cast_copy(self.original, self.device, torch.float32, torch.contiguous_format)
        return self._full

    @torch.inference_mode(False)  # for inference tensors a compiled encoder would be compiled again
    def to(self, device: torch.device, rest: bool = False) -> None:
        """Move `module` to a device; the first time, settle its dtype there.

        Args:
            device: where it computes.
            rest: leave the weights on the CPU until they are needed.
        """
        self._device, self._rests = device, rest and device.type != "cpu"
        place = torch.device("cpu") if self._rests else device
        if self._module is None:
            dtype = self._settle_dtype(device)
            if {parameter.dtype for parameter in self.original.parameters()} <= {dtype}:
                self._module = self.original.to(place)
                lay_out(self._module, self.layout(dtype))
            else:
                self._module = cast_copy(self.original, place, dtype, self.layout(dtype))
            if self.mode is not None:
                self.compilation = Compilation(self._module, self.mode)
        else:
            weight = next(self._module.parameters(), None)
            if weight is None or weight.device != place:  # else each batch by hand would walk through all modules
                self._module = self._module.to(place)
        self._full = self._first = None

    def layout(self, dtype: torch.dtype) -> torch.memory_format:
        """Channels-last is faster in half the bits; in float32 it is not, and rounds otherwise than the pipelines."""
        half = dtype in (torch.bfloat16, torch.float16)
        return torch.channels_last if half and self._channels_last else torch.contiguous_format

    def _settle_dtype(self, device: torch.device) -> torch.dtype:
        if self._wanted is not None:
            return self._wanted
        if not is_of_diffusers(self.original):
            return first_weight(self.original).dtype
        return torch.bfloat16 if computes_bfloat16(device) else torch.float32


def is_of_diffusers(module: nn.Module) -> bool:
    """Whether a module is of a class of diffusers or derives from one."""
    return any(base.__module__.partition(".")[0] == "diffusers" for base in type(module).__mro__)


def config_value(module: nn.Module, name: str) -> Any:
    """What a module's ``config`` says, be it a dict or an object; None where it says nothing."""
    config = getattr(module, "config", None)
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def shown_source(module: nn.Module) -> str:
    """The class of a module and, if diffusers loaded it, from where."""
    source = config_value(module, "_name_or_path")
    return f"{type(module).__name__} from {str(source)!r}" if source else type(module).__name__


def first_weight(module: nn.Module, device: torch.device | None = None) -> Tensor:
    """Whose device and dtype are the module's; for one without weights an empty float32 tensor, on ``device``."""
    return next(module.parameters(), torch.empty(0, dtype=torch.float32, device=device))


def computes_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies in bfloat16 itself, rather than by way of float32."""
    return bool(bfloat16_features(device))


def bfloat16_features(device: torch.device) -> list[str]:
    """What lets the device multiply in bfloat16 itself, as its maker calls it."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return [torch.cuda.get_device_name(device)]
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return [name for name in ("avx512_bf16", "amx_bf16", "bf16") if capabilities.get(name)]
    return []


def cast_copy(module: nn.Module, device: torch.device, dtype: torch.dtype, layout: torch.memory_format) -> nn.Module:
    """A copy on a device and in a dtype, made a tensor at a time: no whole copy lies in between."""
    converted: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        moved = tensor.detach().to(device, dtype if tensor.is_floating_point() else tensor.dtype)
        converted[id(tensor)] = nn.Parameter(moved, requires_grad=False) if isinstance(tensor, nn.Parameter) else moved
    copy = deepcopy(module, converted)
    lay_out(copy, layout)
    return copy


def lay_out(module: nn.Module, layout: torch.memory_format) -> None:
    """Lay out convolution weights; ``module.to(memory_format=…)`` would fail on those of five dimensions."""
    for parameter in module.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=layout)
