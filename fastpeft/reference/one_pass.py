"""multi_lora's forward on a CPU by the host extension, in one pass; by PyTorch's operators it is four calls a slice."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _host
from .routing import Routing


def one_pass(
    ys: Sequence[Tensor],
    x: Tensor,
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    routing: Routing,
    scales: Tensor,
    ranks: Tensor | None,
) -> Tensor | None:
    """``forward`` of ``multi_lora.py`` without dropout, in place on ``ys``; S, or None: nothing has been done.

    Each sum has an order of its own, so a token's bits do not depend on the other tokens; they are not PyTorch's.
    """
    if x.device.type != "cpu" or _host.load() is None:
        return None
    order, starts = routing[:2]
    return torch.ops.fastpeft.multi_lora_add_(ys, x, lora_as, lora_bs, order, starts, scales, ranks)
