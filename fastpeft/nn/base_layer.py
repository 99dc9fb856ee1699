"""What a LoRA layer can stand around: the kinds of frozen layer and the dtypes of their weights."""

from typing import Any

import torch
from torch import Tensor, nn

from .. import _check, ops
from . import dequantisers, quantised
from .branch import own_path_reason
from .read_body import returns_several


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D, whose weight is ``[K, N]``.

    Known by its name and ``nf``, so that transformers need not be there. A layer that trains rows of one is one too.
    """
    return _is_named_conv1d(module.__dict__.get("base_layer", module))


def not_linear_reason(module: nn.Module) -> str | None:
    """None for exactly ``nn.Linear`` or ``Conv1D`` with a plain floating-point weight, else what it is instead."""
    if type(module) is not nn.Linear and not _is_named_conv1d(module):
        return f"a {type(module).__name__}"
    weight = module.weight
    if type(weight) not in _check.PLAIN:  # quantised by torchao, sharded by fully_shard
        return f"a {type(module).__name__} with a {type(weight).__name__} weight"
    if weight.dtype not in _check.FLOATS:
        return f"a {type(module).__name__} with a {weight.dtype} weight"
    return None


def not_adaptable_reason(module: nn.Module) -> str | None:
    """None for what LoRA can stand around: such a layer, one that is written out, or a subclass that is called."""
    if quantised.kind_of(module) is not None or (isinstance(module, nn.Linear) and dequantisers.reads(module)):
        return None
    reason = not_linear_reason(module)
    if reason is None or not isinstance(module, nn.Linear) or type(module).__module__.startswith("torch."):
        return reason  # torch's own subclass is the one in nn.MultiheadAttention, which is read past its forward
    if returns_several(type(module).forward):
        return f"{reason} that returns a tuple"
    weight = module.weight
    plain = type(weight) in _check.PLAIN and weight.dtype in _check.FLOATS
    return None if plain and weight.shape == (module.out_features, module.in_features) else reason


def frozen_weight(module: Any) -> Tensor | ops.Base | str:
    """The weight ``[N, K]`` as an op takes it; or what keeps it from being read, so that the layer is called."""
    reason = own_path_reason(module)
    if reason is not None:
        return reason
    if quantised.kind_of(module) is not None:
        return quantised.base_of(module)
    if is_conv1d(module):
        return module.weight.T
    other, kind = dequantisers.base_of(module), type(module)
    if other is not None:
        return other
    return module.weight if kind is nn.Linear else f"is a {kind.__name__}"


def features(module: Any) -> tuple[int, int]:
    """N and K of a linear layer; of an embedding its width, and how many rows it has."""
    if quantised.kind_of(module) is not None:
        return module.out_features, module.in_features
    n, k = module.weight.shape
    return (k, n) if is_conv1d(module) or isinstance(module, nn.Embedding) else (n, k)


def trained_dtype(weight: torch.dtype) -> torch.dtype:
    """The dtype of what is trained beside a weight: float32 where that is 16 bits wide or less, as in PEFT."""
    return torch.float32 if weight.itemsize <= 2 else weight


def served_dtype(adapter: torch.dtype | None, weight: torch.dtype) -> torch.dtype:
    """The adapter's dtype where the op takes it beside this weight, else the one it is cast to."""
    return weight if adapter == weight else torch.promote_types(weight, torch.float32)


def _is_named_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")
