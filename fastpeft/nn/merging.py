"""What LoRA adapters add to the weight and bias of a frozen layer, and the layer's tensors with it added."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from . import quantised
from .adapter import LoraAdapter
from .base_layer import is_conv1d


def added(adapters: Sequence[LoraAdapter]) -> tuple[Tensor, Tensor | None]:
    """``Σ scale · B A`` as ``[N, K]`` and ``Σ scale · lora_bias`` as ``[N]``, or None where none has one.

    Both are in float32 or wider. There is at least one adapter.
    """
    weights: list[Tensor] = []
    biases: list[Tensor] = []
    for adapter in adapters:
        dtype = torch.promote_types(adapter.lora_A.dtype, torch.float32)
        weights.append(adapter.scale * (adapter.lora_B.to(dtype) @ adapter.lora_A.to(dtype)))
        if adapter.lora_bias is not None:
            biases.append(adapter.scale * adapter.lora_bias.to(dtype))
    return _sum(weights), _sum(biases) if biases else None


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    return functools.reduce(torch.add, tensors)


def exchange(base: nn.Linear, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Give the base these tensors, where there are any, and return those that it had in their place."""
    if quantised.kind_of(base):
        before = quantised.exchange(base, weight)
    else:
        before, base.weight.data = base.weight.data, weight
    if bias is None or base.bias is None:
        return before, None
    before_bias, base.bias.data = base.bias.data, bias
    return before, before_bias


def merged(base: nn.Linear, adapters: Sequence[LoraAdapter]) -> tuple[Tensor, Tensor | None]:
    """The base's weight and bias with the adapters added, in the base's layout and dtype; a bias that stays is None.

    A quantised weight is quantised again, which rounds it: the adapters' part may be lost in that.

    Raises:
        ValueError: A bias has nowhere to go, or a merged value is not finite.
    """
    weight, bias = added(adapters)
    if bias is not None and base.bias is None:
        raise ValueError("lora_bias cannot be merged into a base layer without bias")
    if quantised.kind_of(base):
        return quantised.requantised(base, weight), None if bias is None else (base.bias + bias).to(base.bias.dtype)
    weight = (base.weight + (weight.T if is_conv1d(base) else weight)).to(base.weight.dtype)
    bias = None if bias is None else (base.bias + bias).to(base.bias.dtype)
    if not weight.isfinite().all() or not (bias is None or bias.isfinite().all()):
        raise ValueError("the merged weights are not all finite")
    return weight, bias
