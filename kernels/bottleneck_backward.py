"""The backward kernels of bottleneck and their launchers; see ``bottleneck.py``."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bottleneck_launch import (
    FACTOR,
    FINISH,
    ROWS,
    THRESHOLD,
    blocks_of,
    config,
    math_of,
    math_to,
    norm_of,
    numbers_of,
    seed_stride,
    strides_of,
    tables_of,
)
from .bottleneck_parts import add_parts, finish
from .bottleneck_tiles import column_sum, dot, normalised, project, rows_of, slot_of
from .dropout import keep_tile
from .launch import capability, cdiv, launch, math, split
from .partials import sum_into
from .planes import PLANES, SPLIT, products


@triton.jit
def _hidden_backward_kernel(
    dy_ptr, x_ptr, d_ptr, db_ptr, u_ptr, scale_ptr, nw_ptr, nb_ptr, dw_ptr, zb_ptr, stats_ptr,
    dz_ptr, h_ptr, means_ptr, order_ptr, starts_ptr, tiles_ptr, seed_ptr,
    M, K, N, R, SPAN, numbers_ptr, stride_tiles, stride_stats, stride_means, stride_seed, stride_zb,
    stride_dy, stride_x, stride_d, stride_db, stride_u, stride_scale, stride_nw, stride_nb, stride_h,
    ACTIVATION: tl.constexpr, NORM: tl.constexpr, DROPOUT: tl.constexpr, GROUPED: tl.constexpr, SPLIT: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    pid_m, pid_r, pid_p = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    slot = slot_of(tiles_ptr, pid_m, GROUPED)
    if slot < 0:
        return
    m, row, m_ok, drawn = rows_of(order_ptr, starts_ptr, tiles_ptr, stride_tiles, pid_m, slot, M, GROUPED, BLOCK_M)
    r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    r_ok = r < R
    mean, rstd = tl.zeros((BLOCK_M,), ACC), tl.zeros((BLOCK_M,), ACC)
    if NORM != "":
        mean = tl.load(stats_ptr + m, mask=m_ok, other=0.0)
        rstd = tl.load(stats_ptr + stride_stats + m, mask=m_ok, other=0.0)
    z = project(
        x_ptr, d_ptr + slot * stride_d[0], nw_ptr if nw_ptr is None else nw_ptr + slot * stride_nw[0],
        nb_ptr if nb_ptr is None else nb_ptr + slot * stride_nb[0], row, m_ok, r, mean, rstd,
        pid_p * SPAN, tl.minimum(pid_p * SPAN + SPAN, K), K, R,
        stride_x, stride_d, stride_nw, stride_nb, NORM, ACC, PRECISION, BLOCK_M, BLOCK_K, BLOCK_R,
    )  # fmt: skip
    dh = tl.zeros((BLOCK_M, BLOCK_R), ACC)
    for n0 in range(pid_p * SPAN, tl.minimum(pid_p * SPAN + SPAN, N), BLOCK_K):
        n = (n0 + tl.arange(0, BLOCK_K)).to(tl.int64)
        dy_tile = dy_ptr + row[:, None] * stride_dy[0] + n[None, :] * stride_dy[1]
        g = tl.load(dy_tile, mask=m_ok[:, None] & (n < N)[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        if DROPOUT:
            seed = tl.load(seed_ptr + slot * stride_seed)
            threshold = tl.load(numbers_ptr + THRESHOLD).to(tl.int32)
            g = tl.where(keep_tile(seed, threshold, drawn, n0, BLOCK_K), g, 0.0).to(g.dtype)
        u_tile = u_ptr + slot * stride_u[0] + n[:, None] * stride_u[1] + r[None, :] * stride_u[2]
        u = tl.load(u_tile, mask=(n < N)[:, None] & r_ok[None, :], other=0.0)  # [BLOCK_K, BLOCK_R]
        if scale_ptr is not None:
            scale_tile = scale_ptr + slot * stride_scale[0] + n * stride_scale[1]
            scale = tl.load(scale_tile, mask=n < N, other=0.0).to(ACC)
            if PRECISION == PLANES:  # g stays what it is
                u *= scale[:, None]
            else:
                g = g.to(ACC) * scale[None, :]
        dh = dot(g, u, dh, PRECISION)
    if SPLIT:  # sums over a part of K and of N; ``add_parts`` does the rest
        part = pid_p * stride_h[0] + m[:, None] * stride_h[1] + r[None, :] * stride_h[2]
        tl.store(h_ptr + part, z, mask=m_ok[:, None] & r_ok[None, :])
        tl.store(dz_ptr + part, dh, mask=m_ok[:, None] & r_ok[None, :])
    else:
        finish(
            z, dh, db_ptr if db_ptr is None else db_ptr + slot * stride_db[0],
            dw_ptr if dw_ptr is None else dw_ptr + slot * stride_zb,
            zb_ptr if zb_ptr is None else zb_ptr + slot * stride_zb, dz_ptr, h_ptr, means_ptr,
            m, m_ok, r, R, pid_r, numbers_ptr, stride_db, stride_means, stride_h[1:], ACTIVATION, NORM, ACC,
        )  # fmt: skip


@triton.jit
def _dx_kernel(
    dz_ptr, d_ptr, x_ptr, nw_ptr, stats_ptr, means_ptr, dy_ptr, dx_ptr, order_ptr, starts_ptr, tiles_ptr,
    M, K, R, stride_tiles, stride_stats, stride_means, stride_dz, stride_d, stride_x, stride_nw, stride_dy, stride_dx,
    NORM: tl.constexpr, GROUPED: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    pid_m, pid_k = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    slot = slot_of(tiles_ptr, pid_m, GROUPED)
    if slot < 0:
        return
    m, row, m_ok, _ = rows_of(order_ptr, starts_ptr, tiles_ptr, stride_tiles, pid_m, slot, M, GROUPED, BLOCK_M)
    k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    k_ok = k < K
    dx = tl.zeros((BLOCK_M, BLOCK_K), ACC)
    for r0 in range(0, R, BLOCK_R):
        r = (r0 + tl.arange(0, BLOCK_R)).to(tl.int64)
        dz_tile = dz_ptr + m[:, None] * stride_dz[0] + r[None, :] * stride_dz[1]  # [BLOCK_M, BLOCK_R]
        d_tile = d_ptr + slot * stride_d[0] + r[:, None] * stride_d[1] + k[None, :] * stride_d[2]  # [BLOCK_R, BLOCK_K]
        dz = tl.load(dz_tile, mask=m_ok[:, None] & (r < R)[None, :], other=0.0)
        d = tl.load(d_tile, mask=(r < R)[:, None] & k_ok[None, :], other=0.0)
        dx = dot(dz, d, dx, PRECISION)
    ok = m_ok[:, None] & k_ok[None, :]
    if NORM != "":
        mean = tl.load(stats_ptr + m, mask=m_ok, other=0.0)
        rstd = tl.load(stats_ptr + stride_stats + m, mask=m_ok, other=0.0)
        x = tl.load(x_ptr + row[:, None] * stride_x[0] + k[None, :] * stride_x[1], mask=ok, other=0.0)
        x = normalised(x, mean, rstd, NORM, ACC)
        dx *= tl.load(nw_ptr + slot * stride_nw[0] + k * stride_nw[1], mask=k_ok, other=0.0).to(ACC)[None, :]
        dx -= x * tl.load(means_ptr + stride_means + m, mask=m_ok, other=0.0)[:, None]
        if NORM == "layer":
            dx -= tl.load(means_ptr + m, mask=m_ok, other=0.0)[:, None]
        dx *= rstd[:, None]
    if dy_ptr is not None:
        dx += tl.load(dy_ptr + row[:, None] * stride_dy[0] + k[None, :] * stride_dy[1], mask=ok, other=0.0).to(ACC)
    tl.store(dx_ptr + row[:, None] * stride_dx[0] + k[None, :] * stride_dx[1], dx, mask=ok)


@triton.jit
def _weight_gradient_kernel(
    s_ptr, x_ptr, g_ptr, s_sum_ptr, x_sum_ptr, stats_ptr, order_ptr, starts_ptr, seed_ptr,
    M, K, R, SPAN, numbers_ptr, stride_stats, stride_seed, stride_s, stride_x, stride_g, stride_s_sum, stride_x_sum,
    NORM: tl.constexpr, DROPOUT: tl.constexpr, GROUPED: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    pid_k, pid_r, pid_p = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    if GROUPED:  # the rows of a slot, in their order
        start = tl.load(starts_ptr + pid_p).to(tl.int64)
        first, stop = start, tl.load(starts_ptr + pid_p + 1).to(tl.int64)
    else:
        start = tl.full((), 0, tl.int64)
        first, stop = pid_p * SPAN, tl.minimum(pid_p * SPAN + SPAN, M)
    acc = tl.zeros((BLOCK_K, BLOCK_R), ACC)
    s_sum, x_sum = tl.zeros((BLOCK_R,), ACC), tl.zeros((BLOCK_K,), ACC)
    for m0 in range(first, stop, BLOCK_M):
        m = (m0 + tl.arange(0, BLOCK_M)).to(tl.int64)
        m_ok = m < stop
        row = m
        if GROUPED:
            row = tl.load(order_ptr + m, mask=m_ok, other=0).to(tl.int64)
        x_tile = x_ptr + row[:, None] * stride_x[0] + k[None, :] * stride_x[1]
        s_tile = s_ptr + m[:, None] * stride_s[0] + r[None, :] * stride_s[1]
        x = tl.load(x_tile, mask=m_ok[:, None] & (k < K)[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        s = tl.load(s_tile, mask=m_ok[:, None] & (r < R)[None, :], other=0.0)  # [BLOCK_M, BLOCK_R]
        if NORM != "":
            mean = tl.load(stats_ptr + m, mask=m_ok, other=0.0)
            rstd = tl.load(stats_ptr + stride_stats + m, mask=m_ok, other=0.0)
            x = normalised(x, mean, rstd, NORM, ACC)
        if DROPOUT:
            seed = tl.load(seed_ptr + pid_p * stride_seed)
            threshold = tl.load(numbers_ptr + THRESHOLD).to(tl.int32)
            x = tl.where(keep_tile(seed, threshold, m - start, pid_k * BLOCK_K, BLOCK_K), x, 0.0).to(x.dtype)
        acc = dot(tl.trans(x), s, acc, PRECISION)
        if s_sum_ptr is not None:
            s_sum += column_sum(s.to(ACC), BLOCK_M, BLOCK_R)
        if x_sum_ptr is not None:
            x_sum += column_sum(x.to(ACC), BLOCK_M, BLOCK_K)
    if x_sum_ptr is not None:  # of h and dy
        factor = tl.load(numbers_ptr + FACTOR)
        acc *= factor
        x_sum *= factor
    g_tile = g_ptr + pid_p * stride_g[0] + k[:, None] * stride_g[1] + r[None, :] * stride_g[2]
    tl.store(g_tile, acc, mask=(k < K)[:, None] & (r < R)[None, :])
    if s_sum_ptr is not None:
        tl.store(s_sum_ptr + pid_p * stride_s_sum + r, s_sum, mask=r < tl.where(pid_k == 0, R, 0))
    if x_sum_ptr is not None:
        tl.store(x_sum_ptr + pid_p * stride_x_sum + k, x_sum, mask=k < tl.where(pid_r == 0, K, 0))


def run(
    dy: Tensor, x: Tensor, stats: Tensor, weights, settings, seed: Tensor | None, routing, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """dx and the gradient of every one of the ``weights``; None where ``needs``, in this order, does not ask for it.

    ``stats`` is what ``forward`` kept. The gradients of slots without rows are 0.
    """
    need_x, need_down, need_down_bias, need_up, need_up_bias, need_scale, need_norm, need_norm_bias = needs
    dz, h, means = _hidden_backward(dy, x, stats, weights, settings, seed, routing)
    dx = _dx(dz, x, stats, means, dy, weights, settings, routing) if need_x else None
    ddown = ddown_bias = dup = dup_bias = dscale = dnorm = dnorm_bias = None
    if need_down or need_down_bias or need_norm or need_norm_bias:
        outer, total = _outer(dz, x, weights, settings, None, stats, routing)
        ddown, ddown_bias = outer, total
        if weights.norm_weight is not None:
            down = weights.down.to(outer.dtype)
            dnorm, ddown = (outer * down).sum(-2), outer * weights.norm_weight[..., None, :]
            dnorm_bias = (total[..., None, :] @ down).squeeze(-2)
            if weights.norm_bias is not None:
                ddown += total[..., None] * weights.norm_bias[..., None, :]
    if need_up or need_up_bias or need_scale:
        dup, dup_bias = _outer(h, dy, weights, settings, seed, None, routing)
        if weights.scale is not None:
            dscale = (dup * weights.up).sum(-1)
            dscale = dscale if weights.up_bias is None else dscale + dup_bias * weights.up_bias
            dscale = dscale.sum(-1, keepdim=True) if weights.scale.shape[-1] == 1 else dscale
            dup, dup_bias = dup * weights.scale[..., None], dup_bias * weights.scale
    found = ddown, ddown_bias, dup, dup_bias, dscale, dnorm, dnorm_bias
    dtype = weights.down.dtype
    return dx, *(grad.to(dtype) if need else None for grad, need in zip(found, needs[1:], strict=True))


def _hidden_backward(dy, x, stats, weights, settings, seed, routing):
    """dz and h ``[M, R]``, and where there is a norm the two means of each row ``[2, M]`` that its backward needs."""
    down, down_bias, up, _, scale, norm_weight, norm_bias = weights
    (m, k), hidden, n, acc = x.shape, down.shape[-2], up.shape[-2], math_of(x, weights, dy)
    tile = ROWS if routing is None else routing.tile
    c = config("hidden_backward", hidden, down.dtype, capability(x), tile, acc.precision in SPLIT)
    blocks, tables, stride_tiles = blocks_of(m, c.block_m, routing)
    columns, parts, span = cdiv(hidden, c.block_r), 1, max(k, n)
    if routing is None:
        parts, span = split(max(k, n), c.block_k, blocks * columns)
    dz, h = x.new_empty(m, hidden, dtype=down.dtype), x.new_empty(m, hidden, dtype=down.dtype)
    z, dh = (h[None], dz[None]) if parts == 1 else x.new_empty(2, parts, m, hidden, dtype=acc.torch)
    dw = zb = means = None
    if norm_weight is not None:
        wide = down.to(acc.torch)
        dw = (wide @ norm_weight.to(acc.torch)[..., None]).squeeze(-1).contiguous()
        zb = torch.zeros_like(dw) if norm_bias is None else (wide @ norm_bias.to(acc.torch)[..., None]).squeeze(-1)
        zb = zb if down_bias is None else zb + down_bias
        means = x.new_empty(columns if parts == 1 else cdiv(hidden, FINISH), 2, m, dtype=acc.torch)
    stride_d, stride_db, stride_u, _, stride_scale, stride_nw, stride_nb = strides_of(weights, routing)
    numbers, norm = numbers_of(settings, x, down), norm_of(weights, settings)
    launch(
        _hidden_backward_kernel, (blocks, columns, parts), c, acc,
        dy, x, down, down_bias, up, scale, norm_weight, norm_bias, dw, zb, stats, dh, z, means, *tables, seed,
        m, k, n, hidden, span, numbers, stride_tiles, stats.stride(0), m, seed_stride(seed), hidden,
        dy.stride(), x.stride(), stride_d, stride_db, stride_u, stride_scale, stride_nw, stride_nb, z.stride(),
        ACTIVATION=settings.activation, NORM=norm, DROPOUT=seed is not None,
        GROUPED=routing is not None, SPLIT=parts > 1,
    )  # fmt: skip
    if parts > 1:
        tensors = down_bias, dw, zb, dz, h, means
        add_parts((z, dh), tensors, numbers, stride_db, None, acc, settings.activation, norm)
    return dz, h, None if means is None else means.sum(0).div_(k)


def _dx(dz, x, stats, means, dy, weights, settings, routing):
    (m, hidden), k, down = dz.shape, x.shape[1], weights.down
    acc, tile = math_to(x, weights, x.dtype), ROWS if routing is None else routing.tile
    c = config("dx", hidden, down.dtype, capability(x), tile, acc.precision in SPLIT)
    blocks, tables, stride_tiles = blocks_of(m, c.block_m, routing)
    if routing is None:
        dx = x.new_empty(m, k)
    else:  # rows without an adapter stay as they are here
        dx = dy.to(x.dtype, copy=True, memory_format=torch.contiguous_format) if settings.own else x.new_zeros(m, k)
    stride_d, *_, stride_nw, _ = strides_of(weights, routing)
    launch(
        _dx_kernel, (blocks, cdiv(k, c.block_k)), c, acc,
        dz, down, x, weights.norm_weight, stats, means, dy if settings.own else None, dx, *tables,
        m, k, hidden, stride_tiles, stats.stride(0), m,
        dz.stride(), stride_d, x.stride(), stride_nw, dy.stride(), dx.stride(),
        NORM=norm_of(weights, settings), GROUPED=routing is not None,
    )  # fmt: skip
    return dx


def _outer(s, x, weights, settings, seed, stats, routing):
    """From dz and x: ``dzᵀ x̂`` ``[R, K]`` and Σ dz; from h and dy, without stats: ``gᵀ h`` ``[N, R]`` and Σ g.

    The latter two times the branch's factor.
    """
    (m, k), hidden, of_x = x.shape, s.shape[1], stats is not None
    acc = math(x, s) if of_x and weights.norm_weight is not None else products(x, s, torch.float32)
    c = config("outer", hidden, s.dtype, capability(x), split=acc.precision in SPLIT)
    grid = cdiv(k, c.block_k), cdiv(hidden, c.block_r)
    parts, span = split(m, c.block_m, grid[0] * grid[1], least=8) if routing is None else (routing.slots, 0)
    g = x.new_empty((parts, hidden, k) if of_x else (parts, k, hidden), dtype=acc.torch)
    sums = x.new_empty(parts, hidden if of_x else k, dtype=acc.torch)
    launch(
        _weight_gradient_kernel, (*grid, parts), c, acc,
        s, x, g, sums if of_x else None, None if of_x else sums, stats, *tables_of(routing)[:2], seed,
        m, k, hidden, span, numbers_of(settings, x, s), stats.stride(0) if of_x else 0, seed_stride(seed),
        s.stride(), x.stride(), (g.mT if of_x else g).stride(), sums.stride(0), sums.stride(0),
        NORM=norm_of(weights, settings) if of_x else "", DROPOUT=seed is not None, GROUPED=routing is not None,
    )  # fmt: skip
    if routing is not None:
        return g, sums
    if parts == 1:
        return g[0], sums[0]
    y, total = g.new_empty(g.shape[1:]), sums.new_empty(sums.shape[1:])
    sum_into(g, y, sums, total)
    return y, total
