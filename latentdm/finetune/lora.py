"""`Lora`: low-rank adapters beside frozen weights, by peft, and what of them is saved."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from latentdm.errors import UserError
from latentdm.extras import require
from latentdm.validation import Check

ADAPTER = "default"


@dataclass(frozen=True)
class Lora:
    """The settings of a LoRA. Without a rank there is none, and all weights are trained.

    Args:
        rank: of the two factors.
        alpha: the adapter's output is scaled by alpha / rank; None is ``rank``, a scale of 1.
        targets: ends of the names of the layers that get an adapter, such as ``"to_q"`` or ``"conv_in"``; None takes
            the model's own choice.

    Raises:
        UserError: a value out of range.
        MissingExtraError: the peft package is not installed.

    Example:
        >>> Lora(rank=16, alpha=8, targets=["to_q", "to_v"])  # doctest: +SKIP
    """

    rank: int | None = None
    alpha: float | None = None
    targets: Sequence[str] | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        check = Check("Lora")
        if self.rank is None:
            if self.alpha is not None:
                raise UserError(f"Lora: alpha={self.alpha!r} without a rank; set one: model.lora.rank=16")
            return
        check.integer("rank", self.rank, 1, hint="null trains all weights instead of a LoRA")
        if self.alpha is not None and check.number("alpha", self.alpha, 0) == 0:
            raise check.fail("alpha", "a number above 0", self.alpha)
        if isinstance(self.targets, str) or (self.targets is not None and not self.targets):
            raise check.fail("targets", "a list of names, such as [to_q, to_k, to_v, to_out.0]", self.targets)
        require("peft", "finetune", "Lora")

    @property
    def active(self) -> bool:
        """Whether there is one."""
        return self.rank is not None

    def add_to(self, network: Any, targets: Sequence[str], owner: str) -> None:
        """Freeze a diffusers model and add the adapter, in float32.

        Args:
            network: the model.
            targets: the model's own choice.
            owner: the class that an error names.

        Raises:
            UserError: no layer has one of the names.
        """
        from peft import LoraConfig

        assert self.rank is not None
        wanted = list(self.targets or targets)
        layers = [name for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        for target in wanted:
            if not any(name == target or name.endswith(f".{target}") for name in layers):
                ends = sorted({layer.rpartition(".")[2] for layer in layers if not layer.endswith((".0", ".2"))})
                raise UserError(
                    f"{owner}: lora.targets: no layer of this {type(network).__name__} has a name that ends in "
                    f"{target!r}; names of layers are {', '.join(ends)}"
                )
        network.requires_grad_(False)
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.rank if self.alpha is None else self.alpha,
            target_modules=wanted,
            init_lora_weights="gaussian",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network.add_adapter(config, adapter_name=ADAPTER)
        for weight in network.parameters():
            if weight.requires_grad:
                weight.data = weight.data.float()


def adapter_weights(network: Any, state: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The adapter's tensors under peft's names, on the CPU, from the model or from its ``state``.

    These are the names that diffusers loads without loss. Its own conversion mixes two styles where a convolution is
    among the targets, of which the loader then drops one.
    """
    from peft import get_peft_model_state_dict

    weights = get_peft_model_state_dict(network, state, adapter_name=ADAPTER)
    return {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}


def adapter_metadata(network: Any) -> dict[str, Any]:
    """The adapter's settings. Without them diffusers takes alpha for the rank, and the output is silently wrong."""
    settings: dict[str, Any] = network.peft_config[ADAPTER].to_dict()
    return {name: sorted(value) if isinstance(value, set) else value for name, value in settings.items()}


def kohya_weights(network: Any, state: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The adapter of a UNet as kohya's scripts name it, which ComfyUI and others read.

    ``lora_unet_down_blocks_0_….lora_down.weight``, ``.lora_up.weight`` and ``.alpha``, the true one: diffusers'
    conversion writes the rank there.
    """
    from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya

    prefixed = {f"unet.{name}": weight for name, weight in adapter_weights(network, state).items()}
    converted: dict[str, Tensor] = convert_state_dict_to_kohya(prefixed)
    alpha = float(network.peft_config[ADAPTER].lora_alpha)
    return converted | {name: torch.tensor(alpha) for name in converted if name.endswith(".alpha")}
