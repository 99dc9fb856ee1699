"""lora_mlp where what a node keeps is thrown away before its backward comes: then it keeps x alone.

Under a checkpoint (or where what is kept goes to the CPU) gate and up would be computed in the block's recomputation,
whole, and be all that its backward peaks at. There backward computes them itself, some rows or columns at a time, and
the call is two nodes of autograd. The first, the promise, keeps x, the parameters and the seeds, computes nothing, and
gives a stand-in for y. The second has computed y beside autograd, keeps nothing, and hands dy on to the first. A
checkpoint that is not reentrant ends its recomputation with the last tensor that is kept: where that is the promise's,
as in a block that ends in its MLP, no product of the MLP is computed there. One that is reentrant has no hooks,
and computes y, and gate and up whole, in its recomputation: to keep x alone would cost two products and save little.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_hooks = torch._C._autograd._top_saved_tensors_default_hooks
# Whose hooks throw away what is kept, or move it: others, as those that count it, are to see what is kept without them.
_DISCARDING = ("torch.utils.checkpoint", "torch.autograd.graph")


def pays() -> bool:
    """Whether what a node keeps now is thrown away, or moved: the same in forward and in recomputation."""
    hooks = None if torch.compiler.is_compiling() else _hooks(True)
    return hooks is not None and getattr(hooks[0], "__module__", None) in _DISCARDING


def keep(promise: Tensor, compute: Callable[[], Tensor]) -> Tensor:
    """What ``compute`` gives, with the history of its stand-in.

    Args:
        promise: the stand-in, of y's size.
        compute: gives y; no gradient goes through it.
    """
    return _Kept.apply(promise, compute)


class _Kept(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, promise: Tensor, compute: Callable[[], Tensor]) -> Tensor:
        ctx.shape = promise.shape
        return compute().detach()  # not the view that a reshape without gradients gives, which may not be changed

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy.reshape(ctx.shape), None
