"""What a LoRA layer can stand around: the kinds of frozen layer and the dtypes of their weights."""

import torch
from torch import Tensor, nn

HALF = (torch.float16, torch.bfloat16)


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D, known by its name and ``nf``, so that transformers need not be there."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def not_linear_reason(module: nn.Module) -> str | None:
    """None for exactly ``nn.Linear`` or ``Conv1D`` with a plain floating-point weight, else what it is instead."""
    if type(module) is not nn.Linear and not is_conv1d(module):
        return f"a {type(module).__name__}"
    weight = module.weight
    if type(weight) not in (nn.Parameter, Tensor):  # quantised by torchao, sharded by fully_shard
        return f"a {type(module).__name__} with a {type(weight).__name__} weight"
    if weight.dtype not in (*HALF, torch.float32, torch.float64):
        return f"a {type(module).__name__} with a {weight.dtype} weight"
    return None
