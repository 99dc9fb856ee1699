"""A bottleneck adapter: y = residual + mask ∘ (scale · (act(norm(x) Dᵀ + d) Uᵀ + b)), forward and backward.

    fused             y from x in one kernel, the hidden tile on chip: x is read once, and once more from L2 for a norm
    hidden, up        the same in two, h in between: for wide adapters and few rows; sums may be cut along K
    hidden_backward   h again, dz = (scale · g) U ∘ act'(z) with g = mask ∘ dy: one read of x and one of dy
    dx                dz D, the norm's backward, dy added where the residual is x
    outer             dzᵀ x̂ and hᵀ g with their column sums, from which all weights' gradients follow

Alphabet: x [M, K] has rows m and columns k, y [M, N] columns n, the hidden values [M, R] columns r. With slots a
program takes one tile of one slot's rows; m is then a row's place in the order of ``Routing``, ``row`` the row itself,
and what lies in between is kept by place. A row without an adapter is in no tile.

The norm's backward needs two means over a row, of dẑ = (dz D) ∘ w and of dẑ ∘ x̂. Both are sums over r of dz with what
is known there, Σ_k D w and z less its biases, so no row of dẑ is ever gathered.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bottleneck_backward import run as backward
from .bottleneck_launch import (
    DECODE,
    EPS,
    ROWS,
    STEPS,
    blocks_of,
    config,
    empty_kept,
    math_of,
    math_to,
    norm_of,
    numbers_of,
    seed_stride,
    stride_of,
    strides_of,
)
from .bottleneck_parts import add_parts
from .bottleneck_tiles import activate, add_bias, dot, finish, project, row_stats, rows_of, slot_of
from .launch import capability, cdiv, launch, split
from .planes import SPLIT

__all__ = ["backward", "config", "describe", "empty_kept", "forward", "needs_x"]

FUSED_WIDTH, FUSED_WIDTH_WIDE = 256, 64  # the hidden tile and a weight's tile side by side, without spills
FUSED_BLOCKS = 128  # blocks of rows from which one kernel keeps a GPU busy; below, two of more programs each


@triton.jit
def _fused_kernel(
    x_ptr, d_ptr, db_ptr, u_ptr, ub_ptr, scale_ptr, nw_ptr, nb_ptr, res_ptr, y_ptr, stats_ptr,
    order_ptr, starts_ptr, tiles_ptr, seed_ptr,
    M, K, N, R, numbers_ptr, stride_tiles, stride_stats, stride_seed,
    stride_x, stride_d, stride_db, stride_u, stride_ub, stride_scale, stride_nw, stride_nb, stride_res, stride_y,
    ACTIVATION: tl.constexpr, NORM: tl.constexpr, DROPOUT: tl.constexpr, GROUPED: tl.constexpr,
    UP: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    slot = slot_of(tiles_ptr, pid, GROUPED)
    if slot < 0:
        return
    m, row, m_ok, drawn = rows_of(order_ptr, starts_ptr, tiles_ptr, stride_tiles, pid, slot, M, GROUPED, BLOCK_M)
    r = tl.arange(0, BLOCK_R).to(tl.int64)
    mean, rstd = tl.zeros((BLOCK_M,), ACC), tl.zeros((BLOCK_M,), ACC)
    if NORM != "":
        mean, rstd = row_stats(x_ptr, row, m_ok, K, tl.load(numbers_ptr + EPS), stride_x, NORM, ACC, BLOCK_M, BLOCK_K)
        tl.store(stats_ptr + m, mean, mask=m_ok)
        tl.store(stats_ptr + stride_stats + m, rstd, mask=m_ok)
    z = project(
        x_ptr, d_ptr + slot * stride_d[0], nw_ptr if nw_ptr is None else nw_ptr + slot * stride_nw[0],
        nb_ptr if nb_ptr is None else nb_ptr + slot * stride_nb[0], row, m_ok, r, mean, rstd, 0, K, K, R,
        stride_x, stride_d, stride_nw, stride_nb, NORM, ACC, PRECISION, BLOCK_M, BLOCK_K, BLOCK_R,
    )  # fmt: skip
    z = add_bias(z, db_ptr if db_ptr is None else db_ptr + slot * stride_db[0], r, R, stride_db, ACC)
    h = activate(z, ACTIVATION).to(d_ptr.dtype.element_ty)  # [BLOCK_M, BLOCK_R], stays on chip
    for n0 in range(0, N, BLOCK_K):
        n = (n0 + tl.arange(0, BLOCK_K)).to(tl.int64)
        u_tile = u_ptr + slot * stride_u[0] + r[:, None] * stride_u[2] + n[None, :] * stride_u[1]
        u = tl.load(u_tile, mask=(r < R)[:, None] & (n < N)[None, :], other=0.0)  # [BLOCK_R, BLOCK_K]
        finish(
            dot(h, u, tl.zeros((BLOCK_M, BLOCK_K), ACC), UP),
            ub_ptr if ub_ptr is None else ub_ptr + slot * stride_ub[0],
            scale_ptr if scale_ptr is None else scale_ptr + slot * stride_scale[0],
            res_ptr, y_ptr, seed_ptr if seed_ptr is None else seed_ptr + slot * stride_seed,
            row, m_ok, drawn, n0, N, numbers_ptr,
            stride_ub, stride_scale, stride_res, stride_y, ACC, DROPOUT, BLOCK_K,
        )  # fmt: skip


@triton.jit
def _hidden_kernel(
    x_ptr, d_ptr, db_ptr, nw_ptr, nb_ptr, h_ptr, stats_ptr, order_ptr, starts_ptr, tiles_ptr,
    M, K, R, SPAN, numbers_ptr, stride_tiles, stride_stats,
    stride_x, stride_d, stride_db, stride_nw, stride_nb, stride_h,
    ACTIVATION: tl.constexpr, NORM: tl.constexpr, GROUPED: tl.constexpr, SPLIT: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    pid_m, pid_r, pid_p = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    slot = slot_of(tiles_ptr, pid_m, GROUPED)
    if slot < 0:
        return
    m, row, m_ok, _ = rows_of(order_ptr, starts_ptr, tiles_ptr, stride_tiles, pid_m, slot, M, GROUPED, BLOCK_M)
    r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    mean, rstd = tl.zeros((BLOCK_M,), ACC), tl.zeros((BLOCK_M,), ACC)
    if NORM != "":
        mean, rstd = row_stats(x_ptr, row, m_ok, K, tl.load(numbers_ptr + EPS), stride_x, NORM, ACC, BLOCK_M, BLOCK_K)
        first_program = m_ok & (tl.zeros_like(m) + pid_r + pid_p == 0)
        tl.store(stats_ptr + m, mean, mask=first_program)
        tl.store(stats_ptr + stride_stats + m, rstd, mask=first_program)
    z = project(
        x_ptr, d_ptr + slot * stride_d[0], nw_ptr if nw_ptr is None else nw_ptr + slot * stride_nw[0],
        nb_ptr if nb_ptr is None else nb_ptr + slot * stride_nb[0], row, m_ok, r, mean, rstd,
        pid_p * SPAN, tl.minimum(pid_p * SPAN + SPAN, K), K, R,
        stride_x, stride_d, stride_nw, stride_nb, NORM, ACC, PRECISION, BLOCK_M, BLOCK_K, BLOCK_R,
    )  # fmt: skip
    if not SPLIT:
        z = add_bias(z, db_ptr if db_ptr is None else db_ptr + slot * stride_db[0], r, R, stride_db, ACC)
        z = activate(z, ACTIVATION)
    h_tile = h_ptr + pid_p * stride_h[0] + m[:, None] * stride_h[1] + r[None, :] * stride_h[2]
    tl.store(h_tile, z, mask=m_ok[:, None] & (r < R)[None, :])


@triton.jit
def _hidden_up_kernel(
    h_ptr, u_ptr, ub_ptr, scale_ptr, res_ptr, y_ptr, order_ptr, starts_ptr, tiles_ptr, seed_ptr,
    M, N, R, numbers_ptr, stride_tiles, stride_seed,
    stride_h, stride_u, stride_ub, stride_scale, stride_res, stride_y,
    DROPOUT: tl.constexpr, GROUPED: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    pid_m, pid_n = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    slot = slot_of(tiles_ptr, pid_m, GROUPED)
    if slot < 0:
        return
    m, row, m_ok, drawn = rows_of(order_ptr, starts_ptr, tiles_ptr, stride_tiles, pid_m, slot, M, GROUPED, BLOCK_M)
    n = pid_n * BLOCK_K + tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_K), ACC)
    for r0 in range(0, R, BLOCK_R):
        r = (r0 + tl.arange(0, BLOCK_R)).to(tl.int64)
        h_tile = h_ptr + m[:, None] * stride_h[0] + r[None, :] * stride_h[1]  # [BLOCK_M, BLOCK_R]
        h = tl.load(h_tile, mask=m_ok[:, None] & (r < R)[None, :], other=0.0)
        u_tile = u_ptr + slot * stride_u[0] + r[:, None] * stride_u[2] + n[None, :] * stride_u[1]
        u = tl.load(u_tile, mask=(r < R)[:, None] & (n < N)[None, :], other=0.0)  # [BLOCK_R, BLOCK_K]
        acc = dot(h, u, acc, PRECISION)
    finish(
        acc, ub_ptr if ub_ptr is None else ub_ptr + slot * stride_ub[0],
        scale_ptr if scale_ptr is None else scale_ptr + slot * stride_scale[0],
        res_ptr, y_ptr, seed_ptr if seed_ptr is None else seed_ptr + slot * stride_seed,
        row, m_ok, drawn, pid_n * BLOCK_K, N, numbers_ptr,
        stride_ub, stride_scale, stride_res, stride_y, ACC, DROPOUT, BLOCK_K,
    )  # fmt: skip


def forward(
    x: Tensor, weights, residual: Tensor | None, settings, seed: Tensor | None, routing
) -> tuple[Tensor, Tensor]:
    """y, and where there is a norm the rows' means and reciprocal deviations ``[2, M]``.

    ``weights``, ``settings`` and ``routing`` are ``fastpeft.reference``'s Weights, Settings and Routing, or None. With
    a routing each slot's rows have their own weights; a row without an adapter is its residual, or 0.
    """
    (m, k), hidden, n = x.shape, weights.down.shape[-2], weights.up.shape[-2]
    residual = x if settings.own else residual
    dtype = x.dtype if residual is None else residual.dtype
    if routing is None:
        y = x.new_empty(m, n, dtype=dtype)
    else:  # rows without an adapter stay as they are here
        y = x.new_zeros(m, n) if residual is None else residual.clone(memory_format=torch.contiguous_format)
    stats = empty_kept(x, weights, settings)
    tile, norm = ROWS if routing is None else routing.tile, norm_of(weights, settings)
    acc = math_of(x, weights)
    c = config("fused", hidden, weights.down.dtype, capability(x), tile, acc.precision in SPLIT)
    blocks, tables, stride_tiles = blocks_of(m, c.block_m, routing)
    busy = tile > DECODE if routing is not None else blocks >= FUSED_BLOCKS
    if not busy or hidden > (FUSED_WIDTH_WIDE if weights.down.dtype.itemsize > 2 else FUSED_WIDTH):
        _hidden_and_up(x, weights, residual, settings, seed, routing, y, stats)
        return y, stats
    down, down_bias, up, up_bias, scale, norm_weight, norm_bias = weights
    launch(
        _fused_kernel, (blocks,), c, acc,
        x, down, down_bias, up, up_bias, scale, norm_weight, norm_bias, residual, y, stats, *tables, seed,
        m, k, n, hidden, numbers_of(settings, x, down), stride_tiles, stats.stride(0), seed_stride(seed),
        x.stride(), *strides_of(weights, routing), stride_of(residual), y.stride(),
        ACTIVATION=settings.activation, NORM=norm, DROPOUT=seed is not None, GROUPED=routing is not None,
        UP=math_to(x, weights, y.dtype).precision,
    )  # fmt: skip
    return y, stats


def needs_x(needs: tuple[bool, ...], norm: bool) -> bool:
    """Whether ``backward`` reads x: always, since it computes h again."""
    return any(needs)


def _hidden_and_up(x, weights, residual, settings, seed, routing, y, stats):
    down, down_bias, up, up_bias, scale, norm_weight, norm_bias = weights
    (m, k), hidden, n, tile = x.shape, down.shape[-2], up.shape[-2], ROWS if routing is None else routing.tile
    acc, grouped = math_of(x, weights), routing is not None
    c = config("hidden", hidden, down.dtype, capability(x), tile, acc.precision in SPLIT)
    blocks, tables, stride_tiles = blocks_of(m, c.block_m, routing)
    columns = cdiv(hidden, c.block_r)
    if not grouped:
        parts, span = split(k, c.block_k, blocks * columns)
    else:  # by K alone, so that a row's bits do not depend on the batch
        parts = min(16, cdiv(k, 256)) if tile <= DECODE else 1
        span = cdiv(cdiv(k, parts), c.block_k) * c.block_k
        parts = cdiv(k, span)
    h = x.new_empty(m, hidden, dtype=down.dtype)
    z = h[None] if parts == 1 else x.new_empty(parts, m, hidden, dtype=acc.torch)
    stride_d, stride_db, stride_u, stride_ub, stride_scale, stride_nw, stride_nb = strides_of(weights, routing)
    numbers = numbers_of(settings, x, down)
    launch(
        _hidden_kernel, (blocks, columns, parts), c, acc,
        x, down, down_bias, norm_weight, norm_bias, z, stats, *tables,
        m, k, hidden, span, numbers, stride_tiles, stats.stride(0),
        x.stride(), stride_d, stride_db, stride_nw, stride_nb, z.stride(),
        ACTIVATION=settings.activation, NORM=norm_of(weights, settings), GROUPED=grouped, SPLIT=parts > 1,
    )  # fmt: skip
    if parts > 1:
        tensors = down_bias, None, None, None, h, None
        add_parts((z, None), tensors, numbers, stride_db, routing, acc, settings.activation, "")
    acc = math_to(x, weights, y.dtype)
    c = config("up", hidden, down.dtype, capability(x), tile, acc.precision in SPLIT)
    blocks, tables, stride_tiles = blocks_of(m, c.block_m, routing)
    launch(
        _hidden_up_kernel, (blocks, cdiv(n, c.block_k)), c, acc,
        h, up, up_bias, scale, residual, y, *tables, seed,
        m, n, hidden, numbers, stride_tiles, seed_stride(seed),
        h.stride(), stride_u, stride_ub, stride_scale, stride_of(residual), y.stride(),
        DROPOUT=seed is not None, GROUPED=grouped,
    )  # fmt: skip


def describe(x: Tensor, down: Tensor) -> list[str]:
    """The kernel configurations of a call, for ``fastpeft.explain``."""
    return [f"{step}: {config(step, down.shape[-2], down.dtype, capability(x))}" for step in STEPS]
