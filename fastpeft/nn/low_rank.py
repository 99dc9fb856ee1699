"""A LoRA layer's call in general: any number of active adapters, their weights cast where they have to be."""

from typing import Any, cast

from torch import Tensor

from .. import ops
from . import quantised
from .base_layer import served_dtype


def low_rank(layer: Any, x: Tensor, weights: list[Any], bias: Tensor | None) -> Tensor:
    """The base for which a weight is given, and the term of every active adapter.

    Args:
        layer: A ``LoraLinear``.
        x: ``[..., K]``.
        weights: As of ``lora_linear_shared``, one for each active adapter.
        bias: The base's, or None.
    """
    adapters = layer._adapters(layer.active)
    lora_as, lora_bs = [a.lora_A for a in adapters], [a.lora_B for a in adapters]
    frozen = x.dtype if quantised.is_read(layer.base_layer) else layer.weight.dtype
    dtype = served_dtype(lora_as[0].dtype, frozen)
    if any(a.dtype != dtype for a in lora_as):
        dtype = served_dtype(None, frozen)
        lora_as, lora_bs = ([cast(Any, t.to(dtype)) for t in ts] for ts in (lora_as, lora_bs))
    for adapter in adapters:
        if adapter.lora_bias is not None:
            term = adapter.scale * adapter.lora_bias.to(dtype)
            bias = term if bias is None else bias + term
    bias = quantised.fitting_bias(bias, weights[0], x, dtype)
    scales, dropouts = [a.scale for a in adapters], [a.dropout if layer.training else 0.0 for a in adapters]
    if len(adapters) == 1 and weights[0] is not None:
        return ops.lora_linear(x, weights[0], lora_as[0], lora_bs[0], bias, scales[0], dropouts[0])
    biases = [bias] + [None] * (len(adapters) - 1)
    ys = ops.lora_linear_shared(x, weights, lora_as, lora_bs, biases, scales, dropouts)
    return sum(ys[1:], ys[0])
