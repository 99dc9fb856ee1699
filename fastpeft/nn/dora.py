"""DoRA in a LoRA layer of ours: its magnitude, its forward, and what it makes of the weight.

    y = g ∘ (x (W + scale · B A)ᵀ) + bias        g = magnitude / ‖W + scale · B A‖, of each row

Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation" (2024). With dropout it is PEFT's, as
``ops.dora_linear`` has it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from . import plain, quantised
from .base_layer import frozen_weight, is_conv1d, served_dtype


@torch.no_grad()
def initialise(base: Any, adapter: Any) -> None:
    """Give an adapter the magnitude with which it changes nothing but by B A: the norms that the rows have.

    Args:
        base: The frozen layer.
        adapter: A ``LoraAdapter`` with DoRA.
    """
    if adapter.lora_magnitude.is_meta or base.weight.is_meta:
        return
    adapter.lora_magnitude.copy_(norm(base, adapter.lora_A, adapter.lora_B, adapter.scale))


def norm(base: Any, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """``‖W + scale · B A‖`` of each row, where the base is.

    Args:
        base: A frozen layer.
        lora_a: A, on the base's device, in W's dtype or float32.
        lora_b: B, likewise.
        scale: Factor of B A.

    Raises:
        ValueError: The weight cannot be read.
    """
    weight = frozen_weight(base)
    return ops.dora_norm(_dense(base) if isinstance(weight, str) else weight, lora_a, lora_b, scale)


def call(layer: Any, x: Tensor) -> Tensor:
    """What a layer computes whose active adapter is DoRA.

    Args:
        layer: A ``LoraLinear``.
        x: ``[..., K]``.
    """
    (adapter,) = layer._adapters(layer.active)
    weight, dropout = frozen_weight(layer.base_layer), adapter.dropout if layer.training else 0.0
    other = isinstance(weight, ops.Base) and weight.dtype not in (None, quantised.computed_dtype(x))
    if isinstance(weight, str) or other or plain.is_plain(x):
        return _beside(layer.base_layer, adapter, x, dropout)
    frozen = x.dtype if quantised.is_read(layer.base_layer) else layer.weight.dtype
    dtype = served_dtype(adapter.lora_A.dtype, frozen)
    a, b, magnitude = (t.to(dtype) for t in (adapter.lora_A, adapter.lora_B, adapter.lora_magnitude))
    bias = quantised.fitting_bias(layer.bias, weight, x, dtype)
    y = ops.dora_linear(x, weight, a, b, magnitude, bias, adapter.scale, dropout)
    return quantised.as_given(y, weight, x)


def added(base: Any, adapter: Any, delta: Tensor) -> Tensor:
    """What DoRA adds to the weight ``[N, K]``.

    Args:
        base: The frozen layer.
        adapter: A ``LoraAdapter`` with DoRA.
        delta: ``scale · B A`` in float32 or wider.
    """
    weight = _dense(base).to(delta.dtype)
    total = weight + delta
    gain = adapter.lora_magnitude.to(delta.dtype) / torch.linalg.vector_norm(total, dim=1)
    return gain[:, None] * total - weight


def _beside(base: Any, adapter: Any, x: Tensor, dropout: float) -> Tensor:
    """In plain PyTorch, the base called as it is; dropout is PyTorch's."""
    y, a, b, magnitude = base(x), adapter.lora_A, adapter.lora_B, adapter.lora_magnitude
    weight = _dense(base).to(a.dtype)
    rows = torch.linalg.vector_norm(weight + adapter.scale * (b @ a).detach(), dim=1)
    gain, wide = magnitude / rows, x.to(a.dtype)
    if dropout:
        wide = F.dropout(wide, dropout)
        own = F.linear(wide, weight)
    else:
        own = y if base.bias is None else y - base.bias
    return y + ((gain - 1) * own + gain * adapter.scale * F.linear(F.linear(wide, a), b)).to(y.dtype)


def _dense(base: Any) -> Tensor:
    """The weight ``[N, K]``, written out where it is quantised."""
    if quantised.is_read(base):
        return quantised.written(base)
    return base.weight.T if is_conv1d(base) else base.weight
