"""Layers in plain PyTorch, for calls that no op serves: ``torch.func``, forward mode, ``torch.jit.trace``, layouts.

Dropout masks then come from PyTorch's generator. All else is what the ops compute, up to rounding.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .adapter import LoraAdapter

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "leaky_relu": F.leaky_relu,
    "identity": lambda z: z,
}


def transform() -> str | None:
    """What looks through the call from outside, so that an op's gradient would be hidden from it; or None."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a torch.func transform is active"
    if forward_ad._current_level >= 0:
        return "forward-mode gradients are active"
    return "torch.jit is tracing" if torch._C._is_tracing() else None


def is_plain(x: Tensor) -> bool:
    """Whether a call on x has to be computed in plain PyTorch.

    Args:
        x: The layer's input.
    """
    if torch.compiler.is_compiling():
        return False
    return x.layout is not torch.strided or x.is_nested or transform() is not None


def lora(y: Tensor, x: Tensor, adapters: Sequence[LoraAdapter], training: bool) -> Tensor:
    """``y + Σ scale · ((drop(x) Aᵀ) Bᵀ + lora_bias)``.

    Args:
        y: ``[..., N]``, what the frozen layer gives.
        x: ``[..., K]``, of any layout.
        adapters: The active ones.
        training: Whether dropout acts.
    """
    for adapter in adapters:
        dropped = x if x.dtype == adapter.lora_A.dtype else x.to(adapter.lora_A.dtype)
        if training and adapter.dropout:
            dropped = F.dropout(dropped, adapter.dropout)
        term = F.linear(F.linear(dropped, adapter.lora_A), adapter.lora_B, adapter.lora_bias)
        y = y + (adapter.scale * term).to(y.dtype)
    return y


def bottleneck(adapter: Any, x: Tensor, residual: Tensor | None, dropout: float) -> Tensor:
    """``residual + drop(scale · (act(norm(x) Dᵀ + d) Uᵀ + b))``, of a ``BottleneckAdapter``.

    Args:
        adapter: It.
        x: ``[..., K]``.
        residual: ``[..., K]``, or None for nothing.
        dropout: The probability that holds for this call.
    """
    h = x.to(torch.promote_types(x.dtype, adapter.down_weight.dtype))
    if adapter.norm_weight is not None and adapter.norm == "layer":
        h = F.layer_norm(h, h.shape[-1:], adapter.norm_weight, adapter.norm_bias, adapter.eps)
    elif adapter.norm_weight is not None:
        h = F.rms_norm(h, h.shape[-1:], adapter.norm_weight, adapter.eps)
    h = _ACTIVATIONS[adapter.activation](F.linear(h, adapter.down_weight, adapter.down_bias))
    u = F.dropout(adapter.scale * F.linear(h, adapter.up_weight, adapter.up_bias), dropout)
    return u.to(x.dtype) if residual is None else (residual + u).to(residual.dtype)
