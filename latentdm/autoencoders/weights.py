"""The weights of a frozen module: in which dtype, on which device, in which layout."""

from copy import deepcopy
from typing import Any

import torch
from torch import nn

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def computes_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies in bfloat16 itself, rather than by way of float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return False


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
