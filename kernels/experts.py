"""LoRA on experts: ``multi_lora``'s kernels with experts for slots, and the sum of each token's rows.

    combine   y[t] = Σ_j w[t, j] · rows[places[t, j]]       one read of the rows, one write of y, no sorted copy

Alphabet: x [T, K] has tokens, rows [M, N] pairs of a token and one of its experts, sorted by expert; columns k. A
token's rows are added in the order of its choices, in float32 or wider; places past the last expert's row are not read.
"""

import functools
from collections import namedtuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._device import on_device
from .._mask import threshold
from .launch import Tile, cdiv, math, next_power_of_2, run
from .multi_lora_backward import outer
from .multi_lora_products import add_expanded, planes, write_shrunk
from .partials import reduce_partials

_Slots = namedtuple("_Slots", ("scales", "ranks", "thresholds", "seeds"))


def config(columns: int, dtype: torch.dtype) -> Tile:
    """The tile of ``combine``: rows lie apart, so a program reads a long piece of each of few tokens'."""
    block_k = min(max(32, next_power_of_2(columns)), 512 if dtype.itemsize <= 2 else 256)
    return Tile(4, block_k)


@triton.jit
def _combine_kernel(
    rows_ptr, weights_ptr, places_ptr, starts_ptr, y_ptr, T, N, E, CHOICES,
    stride_rm, stride_rk, stride_wt, stride_wj, stride_pt, stride_pj,
    WEIGHTS: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(1).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    count = tl.load(starts_ptr + E)
    acc = tl.zeros((BLOCK_M, BLOCK_K), ACC)
    for j in range(0, CHOICES):
        place = tl.load(places_ptr + t * stride_pt + j * stride_pj, mask=t < T, other=count).to(tl.int64)
        used = place < count
        rows_tile = rows_ptr + place[:, None] * stride_rm + k[None, :] * stride_rk  # [BLOCK_M, BLOCK_K]
        row = tl.load(rows_tile, mask=used[:, None] & (k < N)[None, :], other=0.0).to(ACC)
        if WEIGHTS:
            w = tl.load(weights_ptr + t * stride_wt + j * stride_wj, mask=used, other=0.0).to(ACC)
            row *= w[:, None]
        acc += row
    tl.store(y_ptr + t[:, None] * N + k[None, :], acc, mask=(t < T)[:, None] & (k < N)[None, :])


def shrink(x: Tensor, lora_a: Tensor, routing, scale: float, dropout: float, seeds: Tensor | None) -> Tensor:
    """``S = scale · drop(x) Aᵀ`` of each row's expert: ``[M, R]``. ``routing``: ``fastpeft.reference``'s Routing."""
    parts = planes(x.shape[1], routing.tile, lora_a.dtype)
    s = x.new_empty(parts, len(x), lora_a.shape[1], dtype=math(x, lora_a).torch)
    write_shrunk(x, [lora_a], s, routing, _slots(lora_a, s.dtype, scale, dropout, seeds))
    return reduce_partials(s, s.dtype)


def expand_(y: Tensor, s: Tensor, lora_b: Tensor, routing, dropout: float, seeds: Tensor | None) -> None:
    """``y += mask ∘ (S Bᵀ) / (1 - p)`` for each row, in place."""
    add_expanded([y], s[None], [lora_b], routing, _slots(lora_b, s.dtype, 1.0, dropout, seeds), total=False)


def dlora_a(ds: Tensor, x: Tensor, routing, gather: bool, dropout: float, seeds: Tensor | None, dtype) -> Tensor:
    """``Σ dS[m]ᵀ drop(x[m])`` over each expert's rows: ``[E, R, K]``; with ``gather`` x is ``[T, K]``."""
    rows = routing.rows._replace(order=routing.tokens) if gather else routing.rows
    return outer(ds, x, rows, _slots(routing.rows.starts[1:], ds.dtype, 1.0, dropout, seeds), dtype)


def dlora_b(d: Tensor, s: Tensor, routing, dtype: torch.dtype) -> Tensor:
    """``Σ d[m]ᵀ S[m]`` over each expert's rows: ``[E, N, R]``."""
    return outer(s, d, routing.rows, _slots(routing.rows.starts[1:], s.dtype, 1.0, 0.0, None), dtype).mT


def dbias(d: Tensor, weights: Tensor, routing, dtype: torch.dtype) -> Tensor:
    """``Σ weights[m] d[m]`` over each expert's rows: ``[E, N]`` for weights ``[M, 1]``."""
    return dlora_b(d, weights, routing, dtype)[:, :, 0].contiguous()


def combine(rows: Tensor, weights: Tensor | None, routing, dtype: torch.dtype) -> Tensor:
    """``Σ_j weights[t, j] · rows[places[t, j]]`` over the choices with an expert: ``[T, N]``; weights None is 1."""
    places, starts = routing.places, routing.rows.starts
    (tokens, choices), columns = places.shape, rows.shape[1]
    y, c = rows.new_empty(tokens, columns, dtype=dtype), config(columns, rows.dtype)
    grid = cdiv(tokens, c.block_m), cdiv(columns, c.block_k)
    if 0 in grid:
        return y
    strides = (0, 0) if weights is None else weights.stride()
    run(
        _combine_kernel, grid,
        rows, weights, places, starts, y, tokens, columns, len(starts) - 1, choices,
        *rows.stride(), *strides, *places.stride(),
        WEIGHTS=weights is not None, ACC=math(rows, rows).triton, **c.options,
    )  # fmt: skip
    return y


def describe(x: Tensor, up, down, *_) -> list[str]:
    """The kernel configurations of a call, for ``fastpeft.explain``."""
    return [f"combine: {config(x.shape[-1], up.weight.dtype)}, the rest as multi_lora with experts for slots"]


def _slots(experts: Tensor, acc: torch.dtype, scale: float, dropout: float, seeds: Tensor | None) -> _Slots:
    count, device = len(experts), experts.device
    dropped = threshold(dropout)
    thresholds = _table(dropped, count, torch.int32, device) if dropped else None
    return _Slots(_table(scale, count, acc, device), None, thresholds, seeds if dropped else None)


@functools.lru_cache(maxsize=256)
def _table(value: float, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The same number for every expert; the few that a model has are made once."""
    return on_device([value] * count, dtype, device)
