"""The products of lora_linear that forward and backward share, and the tile sizes of all its kernels.

    project     S = scale · drop(x) Aᵀ, and dS = scale · dY B        one read of x for all branches
    expand      Y = S Bᵀ + bias, and dX = mask ∘ (dS A) / (1 - p)    one write of Y

See ``lora_linear.py`` for the alphabet.
"""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._device import on_device
from .._mask import inverse_keep, threshold
from .dropout import keep_tile
from .launch import Config, capability, cdiv, launch, math, next_power_of_2, split
from .partials import sum_into

STEPS = ("down", "up", "up_backward", "down_backward")


def config(step: str, rank: int, dtype: torch.dtype, capability: int) -> Config:
    """The tile sizes of ``step`` for S's dtype: by shape, dtype and capability, never by a GPU's name."""
    block_r = min(max(16, next_power_of_2(rank)), 64)
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


# What a row of ``branch_table`` holds, in this order, and how much that is.
START, STOP, SCALE, INVERSE_KEEP, THRESHOLD = map(tl.constexpr, range(5))
FIELDS = tl.constexpr(5)


@functools.lru_cache(maxsize=4096)
def branch_table(
    ranks: tuple[int, ...],
    scales: tuple[float, ...],
    dropouts: tuple[float, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """``[P, 5]``: first column, past-the-end column, scale, 1 / (1 - p), threshold of every branch.

    Kernels read these as data, so a new alpha, rank or dropout compiles nothing.
    """
    rows, start = [], 0
    for rank, scale, dropout in zip(ranks, scales, dropouts, strict=True):
        rows.append([start, start + rank, scale, inverse_keep(dropout), threshold(dropout)])
        start += rank
    return on_device(rows, dtype, device)


@triton.jit
def columns_of(branch_ptr, p, r):
    """Which of the columns r of S are branch p's."""
    return (r >= tl.load(branch_ptr + p * FIELDS + START)) & (r < tl.load(branch_ptr + p * FIELDS + STOP))


@triton.jit
def dot(x, a, acc, PRECISION: tl.constexpr):
    """``acc + x a``, x in the dtype of a, which is exact."""
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
                threshold = tl.load(branch_ptr + p * FIELDS + THRESHOLD).to(tl.int32)
                keep = keep_tile(tl.load(seed_ptr + p), threshold, m, k0, BLOCK_K)
                mine = columns_of(branch_ptr, p, r)
                a_p = a if BRANCHES == 1 else tl.where(mine[None, :], a, 0.0).to(a.dtype)
                acc = dot(tl.where(keep, x, 0.0).to(x.dtype), a_p, acc, PRECISION)
        else:
            acc = dot(x, a, acc, PRECISION)
        x_tile += step * stride_xk
        a_tile += step * stride_ak
    scale = tl.zeros((BLOCK_R,), ACC)
    for p in tl.static_range(BRANCHES):
        mine = columns_of(branch_ptr, p, r)
        factor = tl.load(branch_ptr + p * FIELDS + SCALE) * tl.load(branch_ptr + p * FIELDS + INVERSE_KEEP)
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
            start = tl.load(branch_ptr + p * FIELDS + START).to(tl.int32)
            stop = tl.load(branch_ptr + p * FIELDS + STOP).to(tl.int32)
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
            acc = dot(s, b, acc, PRECISION)
        if DROPOUT:
            threshold = tl.load(branch_ptr + p * FIELDS + THRESHOLD).to(tl.int32)
            keep = keep_tile(tl.load(seed_ptr + p), threshold, m, pid_k * BLOCK_K, BLOCK_K)
            y += tl.where(keep, acc * tl.load(branch_ptr + p * FIELDS + INVERSE_KEEP), 0.0)
        else:
            y = acc
    y_tile = y_ptr + m[:, None] * stride_ym + k[None, :] * stride_yk
    tl.store(y_tile, y, mask=(m < M)[:, None] & (k < K)[None, :])


def project(
    x: Tensor,
    a: Tensor,
    ranks: Sequence[int],
    scales: Sequence[float],
    dropouts: Sequence[float],
    seeds: Tensor | None,
    s: Tensor | None = None,
) -> Tensor:
    """``scale_p · drop_p(x) A_pᵀ`` of the branches side by side: ``[M, R]`` in A's dtype, in s where it is given."""
    (m, k), rank, c = x.shape, a.shape[0], config("down", a.shape[0], a.dtype, capability(x))
    acc = math(x, a)
    grid = cdiv(m, c.block_m), cdiv(rank, c.block_r)
    parts, span = split(k, c.block_k, grid[0] * grid[1])
    if s is None:
        s = x.new_empty(m, rank, dtype=a.dtype)
    partials = x.new_empty(parts, m, rank, dtype=acc.torch) if parts > 1 else s[None]
    table = branch_table(tuple(ranks), tuple(scales), tuple(dropouts), acc.torch, x.device)
    launch(
        _down_kernel, (*grid, parts), c, acc,
        x, a, partials, table, seeds, m, k, rank, span, *x.stride(), *a.stride(), *partials.stride(),
        BRANCHES=len(ranks), DROPOUT=any(map(threshold, dropouts)),
    )  # fmt: skip
    if parts > 1:
        sum_into(partials, s)
    return s


def expand(
    s: Tensor,
    b: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    ranks: Sequence[int],
    dropouts: Sequence[float],
    seeds: Tensor | None,
) -> Tensor:
    """``Σ_p mask_p ∘ (S_p B_pᵀ) / (1 - p_p) + bias``: ``[M, N]`` in ``dtype``."""
    (m, rank), k, dropout = s.shape, b.shape[0], any(map(threshold, dropouts))
    acc, c = math(s, b), config("down_backward" if dropout else "up", rank, s.dtype, capability(s))
    y = s.new_empty(m, k, dtype=dtype)
    table = branch_table(tuple(ranks), (1.0,) * len(ranks), tuple(dropouts), acc.torch, s.device)
    launch(
        _up_kernel, (cdiv(m, c.block_m), cdiv(k, c.block_k)), c, acc,
        s, b, bias, y, table, seeds, m, k, rank,
        *s.stride(), *b.stride(), 0 if bias is None else bias.stride(0), *y.stride(),
        BRANCHES=len(ranks) if dropout else 1, DROPOUT=dropout, BIAS=bias is not None,
    )  # fmt: skip
    return y


def ranks_of(lora_as: Sequence[Tensor]) -> list[int]:
    """The rank of every branch."""
    return [a.shape[0] for a in lora_as]


def stacked(matrices: Sequence[Tensor]) -> Tensor:
    """The matrices of all branches, one below the other."""
    return matrices[0] if len(matrices) == 1 else torch.cat(list(matrices))
