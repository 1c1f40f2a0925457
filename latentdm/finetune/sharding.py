"""A denoiser split over ranks by FSDP2, as `ModelParallelStrategy` wants it, and put together again to be saved."""

from typing import Any

import torch
from torch import Tensor, nn

from latentdm.errors import UserError


def shard(network: nn.Module, mesh: Any, owner: str) -> None:
    """Split a model's weights, gradients and optimizer state over the data-parallel ranks, block by block.

    Args:
        network: the whole model, alike on every rank.
        mesh: Lightning's device mesh, with the dimensions ``data_parallel`` and ``tensor_parallel``.
        owner: the class that an error names.

    Raises:
        UserError: tensor parallelism is asked for, weights of two dtypes would share a shard, or torch is too old.
    """
    try:
        from torch.distributed.fsdp import fully_shard
    except ImportError as error:
        raise UserError(f"{owner}: ModelParallelStrategy needs torch 2.6 or newer, got {torch.__version__}") from error
    if (size := mesh["tensor_parallel"].size()) > 1:
        raise UserError(
            f"{owner}: tensor_parallel_size={size} is not supported, only data parallelism; set "
            "trainer.strategy.tensor_parallel_size=1 and data_parallel_size to the number of devices"
        )
    dtypes = sorted({str(weight.dtype) for weight in network.parameters()})
    if len(dtypes) > 1:
        raise UserError(
            f"{owner}: weights of {' and '.join(dtypes)} cannot share a shard, as of a LoRA beside frozen weights in "
            "half precision; set model.dtype=float32, or train on whole weights: trainer=ddp"
        )
    settings: dict[str, Any] = {"mesh": mesh["data_parallel"]}
    for children in network.children():
        for block in children if isinstance(children, nn.ModuleList) else ():
            fully_shard(block, **settings)
    fully_shard(network, **settings)


def gathered(network: nn.Module, trained: bool) -> dict[str, Tensor] | None:
    """The whole weights of a model that is split over ranks. A collective: every rank calls it.

    Args:
        network: the model.
        trained: leave frozen weights out.

    Returns:
        Name → tensor on the CPU, on rank 0, and an empty dict on the others; None where nothing is split.
    """
    if not any(hasattr(weight, "full_tensor") for weight in network.parameters()):  # as DTensors have
        return None
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=trained)
    state: dict[str, Any] = get_model_state_dict(network, options=options)
    return state


def assembled(network: Any, network_class: str, state: dict[str, Tensor] | None) -> Any:
    """A diffusers model that can be saved: the model itself, or where it is split one of its gathered weights."""
    if state is None:
        return network
    import diffusers

    with torch.device("meta"):  # the weights are there already
        whole = getattr(diffusers, network_class).from_config(network.config)
    whole.load_state_dict(state, assign=True)
    return whole
