"""LoRA on the experts of a mixture-of-experts layer: the definition, and the steps that every backend offers.

``experts`` is what the op means: each expert's tokens go through ``lora_linear``, the activation and ``lora_linear``
as if they were alone. The steps below it are the same algebra on rows sorted by expert. Shapes: ``x [T, H]``; a row is
a pair of a token and one of its k choices, ``M = T k`` of them; of a projection, ``weight [E, N, K]``,
``lora_a [E, R, K]``, ``lora_b [E, N, R]``, S ``[M, R]``. ``Routing`` is that of ``multi_lora``, with experts for
slots.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._mask import inverse_keep, threshold
from .dropout import keep_mask
from .experts_grouped import add_grouped_, grouped_matmul, grouped_outer, grouped_sum
from .lora_linear import lora_linear
from .routing import Routing


class ExpertLinear(NamedTuple):
    """One projection of all experts: ``y = x W_eᵀ + bias_e + scale · (drop(x) A_eᵀ) B_eᵀ`` for expert e.

    Attributes:
        weight: ``[E, N, K]``, any strides.
        bias: ``[E, N]`` or None.
        lora_a: ``[E, R, K]``, or None for no adapter.
        lora_b: ``[E, N, R]``, or None with it.
        scale: dimensionless factor of the low-rank term.
        dropout: probability of dropping an element of the low-rank term's input, in [0, 1).
    """

    weight: Tensor
    bias: Tensor | None = None
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None
    scale: float = 1.0
    dropout: float = 0.0


class ExpertRouting(NamedTuple):
    """The rows of a layer, sorted by expert, stably, those without an expert last; made once, read by both projections.

    Attributes:
        tokens: ``int32 [M]``, each row's token.
        places: ``int32 [T, k]``, the row of each token's choices; from ``starts[E]`` on they have no expert.
        rows: the rows as ``multi_lora`` reads tokens: its order is 0, 1, 2, ...
    """

    tokens: Tensor
    places: Tensor
    rows: Routing


def experts(
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    up: ExpertLinear,
    down: ExpertLinear,
    activation: Callable[[Tensor], Tensor],
    seeds: Tensor | None = None,
) -> Tensor:
    """``y[t] = Σ_j w[t, j] · down_e(activation(up_e(x[t])))`` with ``e = top_k_index[t, j]``; 0 for no expert.

    Args:
        x: ``[T, H]``.
        top_k_index: integers ``[T, k]``; an index outside 0 ... E - 1 is no expert, as in expert parallelism.
        top_k_weights: ``[T, k]``.
        up: the first projection, its K is H.
        down: the second one, its N is H.
        activation: ``[n, N of up]`` to ``[n, K of down]``, row by row.
        seeds: int64 ``[2, E]`` of the dropout masks of up and down. A mask's rows count the expert's own tokens in the
            order of the batch, so the result depends neither on how rows are sorted nor on the other experts: an expert
            draws the mask that it would draw alone.

    Returns:
        ``[T, H]`` in x's dtype, the sum in float32 or wider.
    """
    sums = torch.promote_types(torch.promote_types(x.dtype, top_k_weights.dtype), torch.float32)
    y = x.new_zeros(len(x), down.weight.shape[1], dtype=sums)
    for e in range(len(up.weight)):
        token, choice = (top_k_index == e).nonzero().unbind(1)
        seed_up, seed_down = (None, None) if seeds is None else seeds[:, e]
        h = activation(_projection(x[token], up, e, seed_up))
        y = y.index_add(0, token, _projection(h, down, e, seed_down) * top_k_weights[token, choice, None].to(sums))
    return y.to(x.dtype)


def _projection(x: Tensor, linear: ExpertLinear, e: int, seed: Tensor | None) -> Tensor:
    weight, bias, lora_a, lora_b, scale, dropout = linear
    bias = None if bias is None else bias[e]
    if lora_a is None or lora_b is None:
        return F.linear(x, weight[e], bias)
    return lora_linear(x, weight[e], lora_a[e], lora_b[e], bias, scale, dropout, seed)


def shrink(x: Tensor, lora_a: Tensor, routing: Routing, scale: float, dropout: float, seeds: Tensor | None) -> Tensor:
    """``S = scale · drop(x) Aᵀ`` of each row's expert, in float32 or wider: ``[M, R]``, x being ``[M, K]``."""
    dtype = torch.promote_types(lora_a.dtype, torch.float32)
    mask, factor = _mask(routing, dropout, seeds, x.shape[1], dtype)
    x = x.to(dtype) if mask is None else mask.mul_(x)
    return grouped_matmul(x, lora_a.to(dtype).mT, routing.starts).mul_(scale * factor)


def expand_(y: Tensor, s: Tensor, lora_b: Tensor, routing: Routing, dropout: float, seeds: Tensor | None) -> None:
    """``y += mask ∘ (S Bᵀ) / (1 - p)`` for each row, in place, rounded once; without dropout the mask is 1."""
    mask, factor = _mask(routing, dropout, seeds, y.shape[1], s.dtype)
    b = lora_b.to(s.dtype).mT
    if mask is None and y.dtype == s.dtype:
        return add_grouped_(y, s, b, routing.starts)
    delta = grouped_matmul(s, b, routing.starts)
    delta = delta if mask is None else delta.mul_(mask.mul_(factor))
    y.copy_(delta.add_(y))


def dlora_a(
    ds: Tensor,
    x: Tensor,
    routing: ExpertRouting,
    gather: bool,
    dropout: float,
    seeds: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """``Σ dS[m]ᵀ drop(x[m])`` over each expert's rows: ``[E, R, K]``; with ``gather`` x is ``[T, K]``."""
    mask, factor = _mask(routing.rows, dropout, seeds, x.shape[1], ds.dtype)
    x = x.index_select(0, routing.tokens) if gather else x
    x = x.to(ds.dtype) if mask is None else mask.mul_(x)
    return grouped_outer(ds, x, routing.rows.starts).mul_(factor).to(dtype)


def dlora_b(d: Tensor, s: Tensor, routing: ExpertRouting, dtype: torch.dtype) -> Tensor:
    """``Σ d[m]ᵀ S[m]`` over each expert's rows: ``[E, N, R]``."""
    return grouped_outer(d.to(s.dtype), s, routing.rows.starts).to(dtype)


def dbias(d: Tensor, weights: Tensor, routing: ExpertRouting, dtype: torch.dtype) -> Tensor:
    """``Σ weights[m] d[m]`` over each expert's rows: ``[E, N]`` for weights ``[M, 1]``."""
    return grouped_sum(d * weights, routing.rows.starts).to(dtype)


def combine(rows: Tensor, weights: Tensor | None, routing: ExpertRouting, dtype: torch.dtype) -> Tensor:
    """``Σ_j weights[t, j] · rows[places[t, j]]`` over the choices that have an expert: ``[T, N]``, rounded once.

    weights None is 1. ``rows`` is overwritten where rows have no expert.
    """
    sums = torch.promote_types(torch.promote_types(rows.dtype, torch.float32), dtype)
    places = routing.places
    if not rows.numel():  # embedding_bag wants some
        return rows.new_zeros(len(places), rows.shape[1], dtype=dtype)
    rows[int(routing.rows.starts[-1]) :] = 0
    weights = None if weights is None else weights.to(sums)
    return F.embedding_bag(places, rows.to(sums), per_sample_weights=weights, mode="sum").to(dtype)


def experts_of_rows(routing: Routing) -> Tensor:
    """Each row's expert, int64 ``[M]``; E - 1 for rows that have none."""
    rows = torch.arange(len(routing.order), dtype=torch.int32, device=routing.order.device)
    return torch.searchsorted(routing.starts[1:], rows, right=True).clamp_(max=routing.slots - 1)


def _mask(
    routing: Routing, dropout: float, seeds: Tensor | None, columns: int, dtype: torch.dtype
) -> tuple[Tensor | None, float]:
    """The dropout mask of the rows, and 1 / (1 - p)."""
    if not threshold(dropout):
        return None, 1.0
    experts = experts_of_rows(routing)
    rows = torch.arange(len(experts), device=experts.device) - routing.starts.long()[experts]
    seed = None if seeds is None else seeds[experts]
    return keep_mask(seed, dropout, rows, columns, dtype), inverse_keep(dropout)
