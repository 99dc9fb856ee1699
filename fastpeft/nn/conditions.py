"""What may not differ between a call that computes for others and the call that asks for it; and who may repeat it."""

from typing import Any

import torch
from torch import Tensor

_hooks = torch._C._autograd._top_saved_tensors_default_hooks
_graph_task = torch._C._current_graph_task_id


def autograd_state() -> tuple[Any, int]:
    """The hooks on what is saved for backward, or None; and the backward pass that this thread is in, or -1.

    A call with either may be recomputed, or is a recomputation: see ``reentrant_possible``.
    """
    return _hooks(True), _graph_task()


def call_conditions(x: Tensor, hooks: Any) -> tuple:
    """What must not differ between the call that computed an output and the call that asks for it."""
    device = x.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    return x._version, torch.is_grad_enabled(), autocast and torch.get_autocast_dtype(device), hooks


def reentrant_possible(hooks: Any, task: int) -> bool:
    """Whether this may be the forward of reentrant checkpointing, or its recomputation."""
    return not torch.is_grad_enabled() or (task != -1 and hooks is None)
