"""What may not differ between a call that computes for others and the call that asks for it; and who may repeat it."""

import torch
from torch import Tensor


def call_conditions(x: Tensor) -> tuple:
    """What must not differ between the call that computed an output and the call that asks for it."""
    device = x.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    return (
        x._version,
        torch.is_grad_enabled(),
        autocast and torch.get_autocast_dtype(device),
        torch._C._autograd._top_saved_tensors_default_hooks(True),
    )


def replayable() -> bool:
    """Whether this call may be recomputed, or is a recomputation."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None or torch._C._current_graph_task_id() != -1


def reentrant_possible() -> bool:
    """Whether this may be the forward of reentrant checkpointing, or its recomputation."""
    recomputing = torch._C._current_graph_task_id() != -1
    return not torch.is_grad_enabled() or (
        recomputing and torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    )
