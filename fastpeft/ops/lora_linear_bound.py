"""lora_linear as a function of x alone: what a layer whose other operands stay the same calls."""

from collections.abc import Sequence
from typing import Any

from .. import _plan
from .lora_linear import _planned


def bound(
    weights: Sequence, lora_as: Sequence, lora_bs: Sequence, biases: Sequence, scales: Sequence, dropouts: Sequence
) -> Any:
    """``lora_linear_shared`` of these as a function of x alone, or None: see ``_plan.bound``. Seeds are drawn."""
    count = len(weights)
    op = "lora_linear_shared" if count > 1 else "lora_linear"
    lists = map(list, (weights, lora_as, lora_bs, biases, scales, dropouts))
    arguments = op, count > 1, None, *lists, None if count > 1 else [None], None
    return _plan.bound(_planned, arguments, 2, [*weights, *biases], [*lora_as, *lora_bs])
