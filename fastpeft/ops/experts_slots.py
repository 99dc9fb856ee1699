"""Experts for a batch whose tokens belong to different adapters: what a bank runs, without gradients.

A row is a token and one of its experts. Rows are sorted by expert for the frozen products, and once more by adapter and
expert together, ``slot · E + expert``, for ``multi_lora_``: each row reads the matrices of its token's adapter alone.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..reference.experts import ExpertLinear, experts_of_rows
from ..reference.experts_grouped import grouped_matmul
from ..reference.routing import Routing
from .experts_arguments import routing as rows_by_expert
from .routing import route

Add = Callable[[str, Tensor, Tensor, Routing], None]


def experts_with_slots(
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    up: ExpertLinear,
    down: ExpertLinear,
    activation: Callable[[Tensor], Tensor],
    token_slots: Tensor,
    slots: int,
    add: Add,
) -> Tensor:
    """``y[t] = Σ_j w[t, j] · down_e(activation(up_e(x[t])))`` with ``e = top_k_index[t, j]``, adapters by ``add``.

    Args:
        x: ``[T, H]``.
        top_k_index: integers ``[T, k]``; an index outside 0 ... E - 1 is no expert, and gives 0.
        top_k_weights: ``[T, k]``.
        up: the first projection, frozen: weight ``[E, N, H]`` and bias.
        down: the second one, ``[E, H, K]``.
        activation: ``[n, N of up]`` to ``[n, K of down]``, row by row.
        token_slots: int32 ``[T]``, each token's adapter, -1 for none.
        slots: how many adapters there are.
        add: called with "up" or "down", that projection's output and input ``[T k, ...]`` and the rows' routing among
            ``slots · E``; it adds the adapters' terms in place.

    Returns:
        ``[T, H]`` in x's dtype, the sum in float32 or wider.
    """
    count = len(up.weight)
    routing = rows_by_expert(top_k_index, count, None, None)
    experts, starts = experts_of_rows(routing.rows), routing.rows.starts
    used = routing.rows.order < starts[-1]
    of_rows = token_slots[routing.tokens.long()]
    composite = route(torch.where(used & (of_rows >= 0), of_rows * count + experts, -1), slots * count)
    h = x.to(up.weight.dtype).index_select(0, routing.tokens)
    for name, linear in (("up", up), ("down", down)):
        y = grouped_matmul(h, linear.weight.mT, starts)
        if linear.bias is not None:
            y.add_(linear.bias.index_select(0, experts))
        add(name, y, h, composite)
        h = y if name == "down" else activation(y).to(down.weight.dtype)
    h = torch.where(used[:, None], h, 0)
    sums = torch.promote_types(h.dtype, torch.float32)
    picked = h[routing.places.long()].to(sums) * top_k_weights[:, :, None].to(sums)
    return picked.sum(1).to(x.dtype)
