"""The backward kernels of lora_linear and their launchers; see ``lora_linear.py``."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .._mask import threshold
from .dropout import keep_tile
from .launch import alignment, capability, cdiv, launch, split
from .lora_linear_products import (
    FIELDS,
    INVERSE_KEEP,
    SCALE,
    THRESHOLD,
    aligned,
    bounds_of,
    branch_table,
    config,
    expand,
    project,
    ranks_of,
    stacked,
)
from .partials import reduce_partials, sum_into
from .planes import dot, products

# Above, the partial results of up_backward, written and read again, outweigh a second read of dY.
ONE_PASS_RANK = 16


@triton.jit
def _up_backward_kernel(
    dy_ptr, s_ptr, b_ptr, ds_ptr, db_ptr, branch_ptr,
    M, K, R, SPAN,
    stride_ym, stride_yk, stride_sm, stride_sr, stride_bk, stride_br,
    stride_dsp, stride_dsm, stride_dsr, stride_dbp, stride_dbk, stride_dbr,
    ALIGN: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    pid_k, pid_p = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    r = tl.arange(0, BLOCK_R).to(tl.int64)
    R, stride_sm, stride_bk = aligned(R, ALIGN), aligned(stride_sm, ALIGN), aligned(stride_bk, ALIGN)
    b_tile = b_ptr + k[:, None] * stride_bk + r[None, :] * stride_br
    b = tl.load(b_tile, mask=(k < K)[:, None] & (r < R)[None, :], other=0.0)  # [BLOCK_K, BLOCK_R], stays in registers
    scale = tl.load(branch_ptr + SCALE)
    db = tl.zeros((BLOCK_K, BLOCK_R), ACC)
    first = pid_p * SPAN
    for m0 in range(first, tl.minimum(first + SPAN, M), BLOCK_M):
        m = (m0 + tl.arange(0, BLOCK_M)).to(tl.int64)
        dy_tile = dy_ptr + m[:, None] * stride_ym + k[None, :] * stride_yk
        dy = tl.load(dy_tile, mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        ds = dot(dy, b, tl.zeros((BLOCK_M, BLOCK_R), ACC), PRECISION) * scale
        ds_tile = ds_ptr + pid_k * stride_dsp + m[:, None] * stride_dsm + r[None, :] * stride_dsr
        tl.store(ds_tile, ds, mask=(m < M)[:, None] & (r < R)[None, :])
        s_tile = s_ptr + m[:, None] * stride_sm + r[None, :] * stride_sr
        s = tl.load(s_tile, mask=(m < M)[:, None] & (r < R)[None, :], other=0.0)  # [BLOCK_M, BLOCK_R]
        db = dot(tl.trans(dy), s, db, PRECISION)
    db_tile = db_ptr + pid_p * stride_dbp + k[:, None] * stride_dbk + r[None, :] * stride_dbr
    tl.store(db_tile, db, mask=(k < K)[:, None] & (r < R)[None, :])


@triton.jit
def _outer_kernel(
    s_ptr, x_ptr, g_ptr, branch_ptr, seed_ptr,
    M, K, R, SPAN, blocks, FIRST,
    stride_sm, stride_sr, stride_xm, stride_xk, stride_gp, stride_gr, stride_gk,
    BRANCHES: tl.constexpr, DROPOUT: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    pid_k, pid_r, pid_p = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    stride_sm = aligned(stride_sm, ALIGN)
    branch, start, stop = tl.full((), 0, tl.int64), tl.full((), 0, tl.int64), aligned(tl.full((), R, tl.int64), ALIGN)
    if DROPOUT:  # every branch has an x of its own, and programs that multiply it with the branch's columns alone
        branch, pid_r = pid_r // blocks, pid_r % blocks
        start, stop = bounds_of(branch_ptr, branch, R, BRANCHES, ALIGN)
    r = start + pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_K, BLOCK_R), ACC)
    first = pid_p * SPAN
    for m0 in range(first, tl.minimum(first + SPAN, M), BLOCK_M):
        m = (m0 + tl.arange(0, BLOCK_M)).to(tl.int64)
        x_tile = x_ptr + m[:, None] * stride_xm + k[None, :] * stride_xk
        s_tile = s_ptr + m[:, None] * stride_sm + r[None, :] * stride_sr
        x = tl.load(x_tile, mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        s = tl.load(s_tile, mask=(m < M)[:, None] & (r < stop)[None, :], other=0.0)  # [BLOCK_M, BLOCK_R]
        if DROPOUT:
            threshold = tl.load(branch_ptr + branch * FIELDS + THRESHOLD).to(tl.int32)
            keep = keep_tile(tl.load(seed_ptr + branch), threshold, m, FIRST + pid_k * BLOCK_K, BLOCK_K)
            x = tl.where(keep, x, 0.0).to(x.dtype)
        acc = dot(tl.trans(x), s, acc, PRECISION)
    if DROPOUT:
        acc *= tl.load(branch_ptr + branch * FIELDS + INVERSE_KEEP)
    g_tile = g_ptr + pid_p * stride_gp + k[:, None] * stride_gk + r[None, :] * stride_gr
    tl.store(g_tile, acc, mask=(k < K)[:, None] & (r < stop)[None, :])


def run(
    dys: Sequence[Tensor],
    x: Tensor,
    s: Tensor,
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scales: Sequence[float],
    dropouts: Sequence[float],
    seeds: Tensor,
    need_dx: bool,
    need_da: bool,
    need_db: bool,
) -> tuple[Tensor | None, list[Tensor] | None, list[Tensor] | None]:
    """dX, and dA and dB of every projection. What dA does not need x for, or dB S, may be empty."""
    dx = das = None
    ds, dbs = ups_backward(dys, s, lora_bs, scales, need_dx or need_da, need_db)
    if ds is not None:
        dx, das = down_backward(ds, x, lora_as, dropouts, seeds, need_dx, need_da)
    for dy, weight in zip(dys, weights, strict=True) if need_dx else ():
        if weight.numel():
            dx.addmm_(dy, weight)
    return dx, das, dbs


def ups_backward(
    dys: Sequence[Tensor],
    s: Tensor,
    lora_bs: Sequence[Tensor],
    scales: Sequence[float],
    need_ds: bool,
    need_db: bool,
) -> tuple[Tensor | None, list[Tensor] | None]:
    """``up_backward`` of every projection: the dS side by side, ``[M, R]``, and each dB."""
    ranks, ds = [b.shape[1] for b in lora_bs], None
    parts = s.split(ranks, 1) if need_db else [None] * len(dys)
    if need_ds:
        ds = dys[0].new_empty(dys[0].shape[0], sum(ranks), dtype=lora_bs[0].dtype)
    columns = [None] * len(dys) if ds is None else ds.split(ranks, 1)
    steps = zip(dys, parts, lora_bs, scales, columns, strict=True)
    dbs = [up_backward(*operands, need_db) for operands in steps]
    return ds, dbs if need_db else None


def up_backward(
    dy: Tensor, s: Tensor | None, b: Tensor, scale: float, ds: Tensor | None, need_db: bool
) -> Tensor | None:
    """Writes ``scale · dY B`` into ds ``[M, r]``, columns of a tensor, unless it is None; ``dB = dYᵀ S`` ``[N, r]``."""
    rank = b.shape[1]
    if rank > ONE_PASS_RANK or ds is None or not need_db:
        if ds is not None:
            project(dy, b.T, [rank], [scale], [0.0], None, ds)
        return _outer(s, dy, [rank], [0.0], None, transposed=True) if need_db else None
    (m, n), c = dy.shape, config("up_backward", rank, b.dtype, capability(dy), dy.dtype)
    blocks = cdiv(n, c.block_k)
    parts, span = split(m, c.block_m, blocks)
    acc = products(dy, b, b.dtype)
    several = blocks > 1 or parts > 1
    ds_parts = dy.new_empty(blocks, m, rank, dtype=acc.torch) if several else ds[None]
    db_parts = dy.new_empty(parts, n, rank, dtype=acc.torch if several else b.dtype)
    table = branch_table((rank,), (scale,), (0.0,), acc.torch, dy.device)
    launch(
        _up_backward_kernel, (blocks, parts), c, acc,
        dy, s, b, ds_parts, db_parts, table, m, n, rank, span,
        *dy.stride(), *s.stride(), *b.stride(), *ds_parts.stride(), *db_parts.stride(),
        ALIGN=alignment(rank, s.stride(0), b.stride(0)),
    )  # fmt: skip
    if not several:
        return db_parts[0]
    db = dy.new_empty(n, rank, dtype=b.dtype)
    sum_into(ds_parts, ds, db_parts, db)
    return db


def down_backward(
    ds: Tensor,
    x: Tensor,
    lora_as: Sequence[Tensor],
    dropouts: Sequence[float],
    seeds: Tensor,
    need_dx: bool,
    need_da: bool,
    first: int = 0,
) -> tuple[Tensor | None, list[Tensor] | None]:
    """``dX = Σ_p mask_p ∘ (dS_p A_p) / (1 - p_p)`` in x's dtype and, for every p, ``dA_p = dS_pᵀ drop_p(x)`` in A's.

    x and A may be some columns, of which ``first``, an even number, is the first.
    """
    ranks, dx, das = ranks_of(lora_as), None, None
    if need_dx:
        dx = expand(ds, stacked(lora_as).T, None, x.dtype, ranks, dropouts, seeds, first)
    if need_da:
        das = list(_outer(ds, x, ranks, dropouts, seeds, first).split(ranks))
    return dx, das


def _outer(s, x, ranks, dropouts, seeds, first=0, transposed=False):
    """``Sᵀ drop(x)``: ``[R, K]`` in S's dtype, or ``[K, R]``."""
    (m, k), rank, dropout = x.shape, s.shape[1], any(map(threshold, dropouts))
    widest = max(ranks) if dropout else rank
    acc, c = products(x, s, s.dtype), config("down_backward", widest, s.dtype, capability(x), x.dtype)
    blocks = cdiv(widest, c.block_r)
    grid = cdiv(k, c.block_k), blocks * (len(ranks) if dropout else 1)
    parts, span = split(m, c.block_m, grid[0] * grid[1], full=dropout and c.num_warps < 8)
    g = x.new_empty((parts, k, rank) if transposed else (parts, rank, k), dtype=acc.torch if parts > 1 else s.dtype)
    table = branch_table(tuple(ranks), (1.0,) * len(ranks), tuple(dropouts), acc.torch, x.device)
    launch(
        _outer_kernel, (*grid, parts), c, acc,
        s, x, g, table, seeds, m, k, rank, span, blocks, first,
        *s.stride(), *x.stride(), *(g.mT if transposed else g).stride(),
        BRANCHES=len(ranks) if dropout else 1, DROPOUT=dropout, ALIGN=alignment(*ranks, s.stride(0)),
    )  # fmt: skip
    return reduce_partials(g, s.dtype)
