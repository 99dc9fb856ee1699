"""The backward kernel of multi_lora and its launchers; see ``multi_lora.py``."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dropout import keep_tile
from .launch import cdiv, launch, math
from .multi_lora_products import (
    add_expanded,
    config,
    inverse_keep_of,
    planes,
    rank_of,
    ranks_of,
    write_shrunk,
)
from .planes import dot, products


@triton.jit
def _outer_kernel(
    s_ptr, x_ptr, g_ptr, order_ptr, starts_ptr, rank_ptr, threshold_ptr, seed_ptr,
    K, R, stride_sm, stride_sr, stride_xm, stride_xk, stride_gs, stride_gr, stride_gk,
    RANKS: tl.constexpr, DROPOUT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    pid_k, pid_r, slot = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    r_ok = r < rank_of(rank_ptr, slot, R, RANKS)
    acc = tl.zeros((BLOCK_K, BLOCK_R), ACC)
    start, stop = tl.load(starts_ptr + slot), tl.load(starts_ptr + slot + 1)
    for m0 in range(start, stop, BLOCK_M):
        m = (m0 + tl.arange(0, BLOCK_M)).to(tl.int64)
        token = tl.load(order_ptr + m, mask=m < stop, other=0).to(tl.int64)
        x_tile = x_ptr + token[:, None] * stride_xm + k[None, :] * stride_xk
        s_tile = s_ptr + m[:, None] * stride_sm + r[None, :] * stride_sr
        x = tl.load(x_tile, mask=(m < stop)[:, None] & (k < K)[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        s = tl.load(s_tile, mask=(m < stop)[:, None] & r_ok[None, :], other=0.0)  # [BLOCK_M, BLOCK_R]
        if DROPOUT:
            seed, threshold = tl.load(seed_ptr + slot), tl.load(threshold_ptr + slot)
            keep = keep_tile(seed, threshold, m - start, pid_k * BLOCK_K, BLOCK_K)
            x = tl.where(keep, x, 0.0).to(x.dtype)
        acc = dot(tl.trans(x), s, acc, PRECISION)
    if DROPOUT:
        acc = acc * inverse_keep_of(threshold_ptr, slot, ACC)
    g_tile = g_ptr + slot * stride_gs + k[:, None] * stride_gk + r[None, :] * stride_gr
    tl.store(g_tile, acc, mask=(k < K)[:, None] & (r < R)[None, :])


def run(
    dys: Sequence[Tensor],
    x: Tensor,
    s: Tensor,
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    routing,
    slots,
    need_dx: bool,
    need_da: bool,
    need_db: bool,
) -> tuple[Tensor | None, list[Tensor] | None, list[Tensor] | None]:
    """dX, and dA and dB of every slice. Where dA is not needed, x serves for its shape and dtype alone."""
    ds, dbs = expand_backward(dys, s, lora_bs, routing, slots, need_dx or need_da, need_db)
    dx = das = None
    if ds is not None:
        dx, das = shrink_backward(ds, x, lora_as, routing, slots, need_dx, need_da)
    return dx, das, dbs


def expand_backward(
    dys: Sequence[Tensor], s: Tensor | None, lora_bs: Sequence[Tensor], routing, slots, need_ds: bool, need_db: bool
) -> tuple[Tensor | None, list[Tensor] | None]:
    """``dS_p = scale_p · dY_p B_p`` as ``[1, T, R]`` and, for every p, ``dB_p = dY_pᵀ S_p`` of each slot."""
    slots, ds, dbs = slots._replace(thresholds=None), None, None
    ranks = [b.shape[2] for b in lora_bs]
    if need_ds:
        acc = math(dys[0], lora_bs[0])
        ds = dys[0].new_empty(1, dys[0].shape[0], sum(ranks), dtype=acc.torch)
        for p, (dy, b, ds_p) in enumerate(zip(dys, lora_bs, ds.split(ranks, 2), strict=True)):
            parts = planes(dy.shape[1], routing.tile, lora_bs[0].dtype)
            partial = ds_p if parts == 1 else ds.new_empty(parts, *ds_p.shape[1:])
            write_shrunk(dy, [b.mT], partial, routing, slots.of(p))
            if parts > 1:
                torch.sum(partial, 0, keepdim=True, out=ds_p)
    if need_db:
        s = s[0] if s.shape[0] == 1 else s.sum(0)
        dbs = [
            outer(s_p, dy, routing, slots.of(p), b.dtype).mT.contiguous()
            for p, (s_p, dy, b) in enumerate(zip(s.split(ranks, 1), dys, lora_bs, strict=True))
        ]
    return ds, dbs


def shrink_backward(
    ds: Tensor, x: Tensor, lora_as: Sequence[Tensor], routing, slots, need_dx: bool, need_da: bool
) -> tuple[Tensor | None, list[Tensor] | None]:
    """``dX = Σ_p mask_p ∘ (dS_p A_p) / (1 - p)`` and, for every p, ``dA_p = dS_pᵀ drop_p(x)`` of each slot."""
    dx = das = None
    if need_dx:
        dx = torch.zeros_like(x, memory_format=torch.contiguous_format)  # tokens without an adapter stay 0
        add_expanded([dx], ds, [a.mT for a in lora_as], routing, slots, total=True)
    if need_da:
        parts = ds[0].split(ranks_of(lora_as), 1)
        das = [outer(ds_p, x, routing, slots.of(p), a.dtype) for p, (ds_p, a) in enumerate(zip(parts, lora_as))]
    return dx, das


def outer(s, x, routing, slots, dtype):
    """``Sᵀ drop(x)`` of each slot: ``[slots, R, K]``."""
    k, rank, acc, dropout = x.shape[1], s.shape[1], products(x, s, dtype), slots.thresholds is not None
    c = config("outer", rank, x.dtype, routing.tile, dropout)
    g = x.new_empty(routing.slots, rank, k, dtype=dtype)
    launch(
        _outer_kernel, (cdiv(k, c.block_k), cdiv(rank, c.block_r), routing.slots), c, acc,
        s, x, g, routing.order, routing.starts, *slots[1:], k, rank,
        *s.stride(), *x.stride(), *g.stride(),
        RANKS=slots.ranks is not None, DROPOUT=dropout,
    )  # fmt: skip
    return g
