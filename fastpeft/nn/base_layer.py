"""What a LoRA layer can stand around: the kinds of frozen layer and the dtypes of their weights."""

import torch
from torch import nn

from .. import _check


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


def trained_dtype(weight: torch.dtype) -> torch.dtype:
    """The dtype of what is trained beside a weight: float32 where that is 16 bits wide or less, as in PEFT."""
    return torch.float32 if weight.itemsize <= 2 else weight


def served_dtype(adapter: torch.dtype | None, weight: torch.dtype) -> torch.dtype:
    """The adapter's dtype where the op takes it beside this weight, else the one it is cast to."""
    return weight if adapter == weight else torch.promote_types(weight, torch.float32)


def _is_named_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")
