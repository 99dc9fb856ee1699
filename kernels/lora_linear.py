"""The four memory-bound steps of a LoRA linear layer; the base GEMMs around them belong to cuBLAS.

    down            S  = scale · drop(x) Aᵀ            one read of x for all branches
    up              Y  = S Bᵀ + bias                   one write of Y
    up_backward     dS = scale · dY B, dB = dYᵀ S      one read of dY, up to rank 64
    down_backward   dX = mask ∘ (dS A) / (1 - p)       the up kernel with a mask
                    dA = dSᵀ drop(x)                   one read of x for all branches

Alphabet: x [M, K] or dY [M, N] has rows m and columns k; S has columns r < R. Branches are groups of columns of S.
x may be 16-bit while A, B and S are float32: tiles of x are widened in registers (exact), and the product is taken in
three TF32 terms (float32 accuracy on tensor cores). Sums that cross programs go through partial results.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dropout import keep_tile, threshold
from .launch import Config, branch_table, capability, launch, math, reduce_partials, split

STEPS = ("down", "up", "up_backward", "down_backward")
# Above these ranks the partial results of up_backward outweigh a second read of dY (and float32 ones spill).
ONE_PASS_RANK, ONE_PASS_RANK_WIDE = 64, 32


def config(step: str, rank: int, dtype: torch.dtype, capability: int) -> Config:
    """The tile sizes of ``step`` for S's dtype: by shape, dtype and capability, never by a GPU's name."""
    block_r = min(max(16, triton.next_power_of_2(rank)), 64)
    wide = dtype.itemsize > 2  # float32 tiles take twice the shared memory, and three TF32 terms more registers
    if step == "down":
        warps = 8 if block_r > 16 else 4
        return Config(32 if wide and block_r > 32 else 64, 32 if wide else 64, block_r, warps, 4)
    if step == "up":
        return Config(64, 64 if wide else 128, 16 if wide else block_r, 8 if wide or block_r > 16 else 4, 2)
    if step == "up_backward":  # columns decide how many partial dS there are: 2 r / block_k of dY's bytes
        return Config(32, 64 if wide and block_r > 16 else 128, block_r, 8 if wide or block_r > 16 else 4, 2)
    if step == "down_backward":
        if wide:
            return Config(32, 64, min(block_r, 32), 4, 2)
        return Config(64, 64, block_r, 8 if block_r > 16 else 4, 3)
    raise ValueError(f"config: step is {step!r}, expected down, up, up_backward or down_backward")


@triton.jit
def _dot(x, a, acc, PRECISION: tl.constexpr):
    return tl.dot(x.to(a.dtype), a, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def _down_kernel(
    x_ptr, a_ptr, s_ptr, branch_ptr, seed_ptr,
    M, K, R, SPAN,
    stride_xm, stride_xk, stride_ar, stride_ak, stride_sp, stride_sm, stride_sr,
    BRANCHES: tl.constexpr, DROPOUT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    pid_m, pid_r, pid_p = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    first = pid_p * SPAN
    k = first + tl.arange(0, BLOCK_K)
    x_tile = x_ptr + m[:, None] * stride_xm + k[None, :] * stride_xk  # [BLOCK_M, BLOCK_K]
    a_tile = a_ptr + k[:, None] * stride_ak + r[None, :] * stride_ar  # [BLOCK_K, BLOCK_R]
    acc = tl.zeros((BLOCK_M, BLOCK_R), ACC)
    step = tl.full((), BLOCK_K, tl.int64)  # times a stride: past 2**31 when columns lie far apart
    for k0 in range(first, tl.minimum(first + SPAN, K), BLOCK_K):
        k_ok = k0 + tl.arange(0, BLOCK_K) < K
        x = tl.load(x_tile, mask=(m < M)[:, None] & k_ok[None, :], other=0.0)
        a = tl.load(a_tile, mask=k_ok[:, None] & (r < R)[None, :], other=0.0)
        if DROPOUT:
            for p in tl.static_range(BRANCHES):
                keep = keep_tile(tl.load(seed_ptr + p), tl.load(branch_ptr + p * 5 + 4).to(tl.int32), m, k0, BLOCK_K)
                mine = (r >= tl.load(branch_ptr + p * 5)) & (r < tl.load(branch_ptr + p * 5 + 1))
                a_p = a if BRANCHES == 1 else tl.where(mine[None, :], a, 0.0).to(a.dtype)
                acc = _dot(tl.where(keep, x, 0.0).to(x.dtype), a_p, acc, PRECISION)
        else:
            acc = _dot(x, a, acc, PRECISION)
        x_tile += step * stride_xk
        a_tile += step * stride_ak
    scale = tl.zeros((BLOCK_R,), ACC)
    for p in tl.static_range(BRANCHES):
        mine = (r >= tl.load(branch_ptr + p * 5)) & (r < tl.load(branch_ptr + p * 5 + 1))
        factor = tl.load(branch_ptr + p * 5 + 2) * tl.load(branch_ptr + p * 5 + 3)
        scale = tl.where(mine, factor, scale)
    s_tile = s_ptr + pid_p * stride_sp + m[:, None] * stride_sm + r[None, :] * stride_sr
    tl.store(s_tile, acc * scale[None, :], mask=(m < M)[:, None] & (r < R)[None, :])


@triton.jit
def _up_kernel(
    s_ptr, b_ptr, bias_ptr, y_ptr, branch_ptr, seed_ptr,
    M, K, R,
    stride_sm, stride_sr, stride_bk, stride_br, stride_bias, stride_ym, stride_yk,
    BRANCHES: tl.constexpr, DROPOUT: tl.constexpr, BIAS: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    pid_m, pid_k = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    y = tl.zeros((BLOCK_M, BLOCK_K), ACC)
    if BIAS:
        y += tl.load(bias_ptr + k * stride_bias, mask=k < K, other=0.0).to(ACC)[None, :]
    for p in tl.static_range(BRANCHES):
        if DROPOUT:
            start, stop = tl.load(branch_ptr + p * 5).to(tl.int32), tl.load(branch_ptr + p * 5 + 1).to(tl.int32)
            acc = tl.zeros((BLOCK_M, BLOCK_K), ACC)
        else:
            start, stop = 0, R
            acc = y
        for r0 in range(start, stop, BLOCK_R):
            r = (r0 + tl.arange(0, BLOCK_R)).to(tl.int64)
            s_tile = s_ptr + m[:, None] * stride_sm + r[None, :] * stride_sr  # [BLOCK_M, BLOCK_R]
            b_tile = b_ptr + r[:, None] * stride_br + k[None, :] * stride_bk  # [BLOCK_R, BLOCK_K]
            s = tl.load(s_tile, mask=(m < M)[:, None] & (r < stop)[None, :], other=0.0)
            b = tl.load(b_tile, mask=(r < stop)[:, None] & (k < K)[None, :], other=0.0)
            acc = _dot(s, b, acc, PRECISION)
        if DROPOUT:
            threshold = tl.load(branch_ptr + p * 5 + 4).to(tl.int32)
            keep = keep_tile(tl.load(seed_ptr + p), threshold, m, pid_k * BLOCK_K, BLOCK_K)
            y += tl.where(keep, acc * tl.load(branch_ptr + p * 5 + 3), 0.0)
        else:
            y = acc
    y_tile = y_ptr + m[:, None] * stride_ym + k[None, :] * stride_yk
    tl.store(y_tile, y, mask=(m < M)[:, None] & (k < K)[None, :])


@triton.jit
def _up_backward_kernel(
    dy_ptr, s_ptr, b_ptr, ds_ptr, db_ptr, branch_ptr,
    M, K, R, SPAN,
    stride_ym, stride_yk, stride_sm, stride_sr, stride_bk, stride_br,
    stride_dsp, stride_dsm, stride_dsr, stride_dbp, stride_dbk, stride_dbr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    pid_k, pid_p = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    r = tl.arange(0, BLOCK_R).to(tl.int64)
    b_tile = b_ptr + k[:, None] * stride_bk + r[None, :] * stride_br
    b = tl.load(b_tile, mask=(k < K)[:, None] & (r < R)[None, :], other=0.0)  # [BLOCK_K, BLOCK_R], stays in registers
    scale = tl.load(branch_ptr + 2)
    db = tl.zeros((BLOCK_K, BLOCK_R), ACC)
    first = pid_p * SPAN
    for m0 in range(first, tl.minimum(first + SPAN, M), BLOCK_M):
        m = (m0 + tl.arange(0, BLOCK_M)).to(tl.int64)
        dy_tile = dy_ptr + m[:, None] * stride_ym + k[None, :] * stride_yk
        dy = tl.load(dy_tile, mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        ds = _dot(dy, b, tl.zeros((BLOCK_M, BLOCK_R), ACC), PRECISION) * scale
        ds_tile = ds_ptr + pid_k * stride_dsp + m[:, None] * stride_dsm + r[None, :] * stride_dsr
        tl.store(ds_tile, ds, mask=(m < M)[:, None] & (r < R)[None, :])
        s_tile = s_ptr + m[:, None] * stride_sm + r[None, :] * stride_sr
        s = tl.load(s_tile, mask=(m < M)[:, None] & (r < R)[None, :], other=0.0)  # [BLOCK_M, BLOCK_R]
        db = _dot(tl.trans(dy), s, db, PRECISION)
    db_tile = db_ptr + pid_p * stride_dbp + k[:, None] * stride_dbk + r[None, :] * stride_dbr
    tl.store(db_tile, db, mask=(k < K)[:, None] & (r < R)[None, :])


@triton.jit
def _outer_kernel(
    s_ptr, x_ptr, g_ptr, branch_ptr, seed_ptr,
    M, K, R, SPAN,
    stride_sm, stride_sr, stride_xm, stride_xk, stride_gp, stride_gr, stride_gk,
    BRANCHES: tl.constexpr, DROPOUT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    pid_k, pid_r, pid_p = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_K, BLOCK_R), ACC)
    first = pid_p * SPAN
    for m0 in range(first, tl.minimum(first + SPAN, M), BLOCK_M):
        m = (m0 + tl.arange(0, BLOCK_M)).to(tl.int64)
        x_tile = x_ptr + m[:, None] * stride_xm + k[None, :] * stride_xk
        s_tile = s_ptr + m[:, None] * stride_sm + r[None, :] * stride_sr
        x = tl.load(x_tile, mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        s = tl.load(s_tile, mask=(m < M)[:, None] & (r < R)[None, :], other=0.0)  # [BLOCK_M, BLOCK_R]
        if DROPOUT:
            for p in tl.static_range(BRANCHES):
                threshold = tl.load(branch_ptr + p * 5 + 4).to(tl.int32)
                keep = keep_tile(tl.load(seed_ptr + p), threshold, m, pid_k * BLOCK_K, BLOCK_K)
                mine = (r >= tl.load(branch_ptr + p * 5)) & (r < tl.load(branch_ptr + p * 5 + 1))
                s_p = s if BRANCHES == 1 else tl.where(mine[None, :], s, 0.0).to(s.dtype)
                acc = _dot(tl.trans(tl.where(keep, x, 0.0).to(x.dtype)), s_p, acc, PRECISION)
        else:
            acc = _dot(tl.trans(x), s, acc, PRECISION)
    factor = tl.zeros((BLOCK_R,), ACC)
    for p in tl.static_range(BRANCHES):
        mine = (r >= tl.load(branch_ptr + p * 5)) & (r < tl.load(branch_ptr + p * 5 + 1))
        factor = tl.where(mine, tl.load(branch_ptr + p * 5 + 3), factor)
    g_tile = g_ptr + pid_p * stride_gp + k[:, None] * stride_gk + r[None, :] * stride_gr
    tl.store(g_tile, acc * factor[None, :], mask=(k < K)[:, None] & (r < R)[None, :])


def down(
    x: Tensor, lora_as: Sequence[Tensor], scales: Sequence[float], dropouts: Sequence[float], seeds: Tensor
) -> Tensor:
    """``S_p = scale_p · drop_p(x) A_pᵀ`` side by side: ``[M, R]`` in A's dtype."""
    return _project(x, _stack(lora_as), _ranks(lora_as), scales, dropouts, seeds)


def up(s: Tensor, b: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``S Bᵀ + bias``: ``[M, N]`` in ``dtype``."""
    return _expand(s, b, bias, dtype, [b.shape[1]], [0.0], None)


def up_backward(
    dy: Tensor, s: Tensor | None, b: Tensor, scale: float, need_ds: bool, need_db: bool
) -> tuple[Tensor | None, Tensor | None]:
    """``dS = scale · dY B`` ``[M, r]`` and ``dB = dYᵀ S`` ``[N, r]``, in B's dtype."""
    rank = b.shape[1]
    if rank > (ONE_PASS_RANK_WIDE if b.dtype.itemsize > 2 else ONE_PASS_RANK) or not (need_ds and need_db):
        ds = _project(dy, b.T, [rank], [scale], [0.0], None) if need_ds else None
        db = _outer(s, dy, [rank], [0.0], None).T.contiguous() if need_db else None
        return ds, db
    (m, n), c = dy.shape, config("up_backward", rank, b.dtype, capability(dy))
    blocks = triton.cdiv(n, c.block_k)
    parts, span = split(m, c.block_m, blocks)
    acc = math(dy, b)
    ds = dy.new_empty(blocks, m, rank, dtype=acc.torch)
    db = dy.new_empty(parts, n, rank, dtype=acc.torch)
    table = branch_table((rank,), (scale,), (0.0,), acc.torch, dy.device)
    launch(
        _up_backward_kernel, (blocks, parts), c, acc,
        dy, s, b, ds, db, table, m, n, rank, span,
        *dy.stride(), *s.stride(), *b.stride(), *ds.stride(), *db.stride(),
    )  # fmt: skip
    return reduce_partials(ds, b.dtype), reduce_partials(db, b.dtype)


def down_backward(
    ds: Tensor,
    x: Tensor,
    lora_as: Sequence[Tensor],
    dropouts: Sequence[float],
    seeds: Tensor,
    need_dx: bool,
    need_da: bool,
) -> tuple[Tensor | None, list[Tensor] | None]:
    """``dX = Σ_p mask_p ∘ (dS_p A_p) / (1 - p_p)`` in x's dtype and, for every p, ``dA_p = dS_pᵀ drop_p(x)`` in A's."""
    ranks, dx, das = _ranks(lora_as), None, None
    if need_dx:
        dx = _expand(ds, _stack(lora_as).T, None, x.dtype, ranks, dropouts, seeds)
    if need_da:
        das = [da.clone() if len(ranks) > 1 else da for da in _outer(ds, x, ranks, dropouts, seeds).split(ranks)]
    return dx, das


def _project(x, a, ranks, scales, dropouts, seeds):
    (m, k), rank, c = x.shape, a.shape[0], config("down", a.shape[0], a.dtype, capability(x))
    acc = math(x, a)
    grid = triton.cdiv(m, c.block_m), triton.cdiv(rank, c.block_r)
    parts, span = split(k, c.block_k, grid[0] * grid[1])
    s = x.new_empty(parts, m, rank, dtype=acc.torch if parts > 1 else a.dtype)
    table = branch_table(tuple(ranks), tuple(scales), tuple(dropouts), acc.torch, x.device)
    launch(
        _down_kernel, (*grid, parts), c, acc,
        x, a, s, table, seeds, m, k, rank, span, *x.stride(), *a.stride(), *s.stride(),
        BRANCHES=len(ranks), DROPOUT=any(map(threshold, dropouts)),
    )  # fmt: skip
    return reduce_partials(s, a.dtype)


def _expand(s, b, bias, dtype, ranks, dropouts, seeds):
    (m, rank), k, dropout = s.shape, b.shape[0], any(map(threshold, dropouts))
    acc, c = math(s, b), config("down_backward" if dropout else "up", rank, s.dtype, capability(s))
    y = s.new_empty(m, k, dtype=dtype)
    table = branch_table(tuple(ranks), (1.0,) * len(ranks), tuple(dropouts), acc.torch, s.device)
    launch(
        _up_kernel, (triton.cdiv(m, c.block_m), triton.cdiv(k, c.block_k)), c, acc,
        s, b, bias, y, table, seeds, m, k, rank,
        *s.stride(), *b.stride(), 0 if bias is None else bias.stride(0), *y.stride(),
        BRANCHES=len(ranks) if dropout else 1, DROPOUT=dropout, BIAS=bias is not None,
    )  # fmt: skip
    return y


def _outer(s, x, ranks, dropouts, seeds):
    """``Sᵀ drop(x)``: ``[R, K]`` in S's dtype."""
    (m, k), rank, c = x.shape, s.shape[1], config("down_backward", s.shape[1], s.dtype, capability(x))
    acc = math(x, s)
    grid = triton.cdiv(k, c.block_k), triton.cdiv(rank, c.block_r)
    parts, span = split(m, c.block_m, grid[0] * grid[1])
    g = x.new_empty(parts, rank, k, dtype=acc.torch if parts > 1 else s.dtype)
    table = branch_table(tuple(ranks), (1.0,) * len(ranks), tuple(dropouts), acc.torch, x.device)
    launch(
        _outer_kernel, (*grid, parts), c, acc,
        s, x, g, table, seeds, m, k, rank, span, *s.stride(), *x.stride(), *g.stride(),
        BRANCHES=len(ranks), DROPOUT=any(map(threshold, dropouts)),
    )  # fmt: skip
    return reduce_partials(g, s.dtype)


def describe(x: Tensor, lora_as: Sequence[Tensor], *_) -> list[str]:
    """The kernel configurations of a call, for ``fastpeft.explain``."""
    rank, dtype = sum(_ranks(lora_as)), lora_as[0].dtype
    return [f"{step}: {config(step, rank, dtype, capability(x))}" for step in STEPS]


def _ranks(lora_as: Sequence[Tensor]) -> list[int]:
    return [a.shape[0] for a in lora_as]


def _stack(matrices: Sequence[Tensor]) -> Tensor:
    return matrices[0] if len(matrices) == 1 else torch.cat(list(matrices))
