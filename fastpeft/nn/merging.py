"""What LoRA adapters add to the weight and bias of a frozen layer, and the layer's tensors with it added."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import dora, quantised
from .adapter import LoraAdapter
from .base_layer import is_conv1d

Merged = tuple[Tensor | nn.Module, Tensor | None]  # weight and bias, or a layer in place of the base


def added(base: nn.Linear, adapters: Sequence[LoraAdapter]) -> tuple[Tensor, Tensor | None]:
    """``Σ scale · B A`` as ``[N, K]`` and ``Σ scale · lora_bias`` as ``[N]``, or None where none has one.

    Both are in float32 or wider. There is at least one adapter. DoRA adds what it makes of W and B A, without W.
    """
    weights: list[Tensor] = []
    biases: list[Tensor] = []
    for adapter in adapters:
        dtype = torch.promote_types(adapter.lora_A.dtype, torch.float32)
        delta = adapter.scale * (adapter.lora_B.to(dtype) @ adapter.lora_A.to(dtype))
        weights.append(delta if adapter.lora_magnitude is None else dora.added(base, adapter, delta))
        if adapter.lora_bias is not None:
            biases.append(adapter.scale * adapter.lora_bias.to(dtype))
    return _sum(weights), _sum(biases) if biases else None


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    return functools.reduce(torch.add, tensors)


def exchange(layer: Any, weight: Tensor | nn.Module, bias: Tensor | None) -> Merged:
    """Give a layer's base these tensors, where there are any, and return those that it had in their place.

    Args:
        layer: A ``LoraLinear``.
        weight: Of the base; or another base.
        bias: Of the base, or None.
    """
    base = layer.base_layer
    if isinstance(weight, nn.Module):
        layer.base_layer = weight
        return base, None
    if quantised.kind_of(base):
        before = quantised.exchange(base, weight)
    else:
        before, base.weight.data = base.weight.data, weight
    if bias is None or base.bias is None:
        return before, None
    before_bias, base.bias.data = base.bias.data, bias
    return before, before_bias


def merged(base: nn.Linear, adapters: Sequence[LoraAdapter], dequantise: torch.dtype | None = None) -> Merged:
    """The base's weight and bias with the adapters added, in the base's layout and dtype; a bias that stays is None.

    A quantised weight is quantised again, which rounds it: the adapters' part may be lost in that.

    Args:
        base: The frozen layer.
        adapters: At least one.
        dequantise: The dtype of a plain layer that is to stand in the place of a quantised one.

    Raises:
        ValueError: A bias has nowhere to go, or a merged value is not finite.
    """
    weight, bias = added(base, adapters)
    if bias is not None and base.bias is None:
        raise ValueError("lora_bias cannot be merged into a base layer without bias")
    bias = None if bias is None else (base.bias + bias).to(base.bias.dtype)
    if quantised.is_read(base):
        if dequantise is None and quantised.kind_of(base):
            return quantised.requantised(base, weight), bias
        if dequantise is None:
            raise ValueError(f"a {type(base).__name__} cannot be quantised again, expected dequantise=True")
        weight = (quantised.written(base) + weight).to(dequantise)
    else:
        weight = (base.weight + (weight.T if is_conv1d(base) else weight)).to(base.weight.dtype)
    if not weight.isfinite().all() or not (bias is None or bias.isfinite().all()):
        raise ValueError("the merged weights are not all finite")
    return (_plain(base, weight, bias), None) if quantised.is_read(base) else (weight, bias)


def _plain(base: nn.Linear, weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A layer of the weight's dtype, frozen as the base is, in its mode; without a bias of its own, the base's."""
    n, k = weight.shape
    layer = nn.Linear(k, n, base.bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if base.bias is not None:
        layer.bias = nn.Parameter(
            (base.bias if bias is None else bias).to(weight.dtype, copy=True), requires_grad=False
        )
    return layer.train(base.training)
