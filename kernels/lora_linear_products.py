"""The products of lora_linear that forward and backward share, and the tile sizes of all its kernels.

    project     S = scale · drop(x) Aᵀ, and dS = scale · dY B        one read of x for all branches
    expand      Y = S Bᵀ + bias, and dX = mask ∘ (dS A) / (1 - p)    one write of Y

See ``lora_linear.py`` for the alphabet.
"""

import functools
from collections.abc import Sequence
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._device import on_device
from .._mask import inverse_keep, threshold
from .dropout import keep_tile
from .launch import WARPGROUPS, Config, alignment, capability, cdiv, launch, next_power_of_2, split
from .partials import sum_into
from .planes import dot, products

STEPS = ("down", "up", "up_backward", "down_backward")


def config(step: str, rank: int, dtype: torch.dtype, capability: int, other: torch.dtype | None = None) -> Config:
    """The tile sizes of ``step`` for S's dtype: by shape, dtype and capability, never by a GPU's name.

    ``other`` is the dtype of x, y or dY, where it is not S's.
    """
    block_r = min(max(16, next_power_of_2(rank)), 64)
    if dtype == torch.float32 and other == torch.bfloat16:
        return _config_of_planes(step, block_r, capability)
    wide = dtype.itemsize > 2  # float32 tiles take twice the shared memory, and three TF32 terms more registers
    large = block_r > 16  # two warpgroups of 64 rows each, so that A, B or S are read again less often
    rows = 128 if capability in WARPGROUPS else 64  # elsewhere 128 spill a few registers where nothing is aligned
    if step == "down":
        if large and not wide:
            return Config(rows, 64, block_r, 8, 3)
        return Config(32 if wide and block_r > 32 else 64, 32 if wide else 64, block_r, 8 if large else 4, 4)
    if step == "up":
        if large and not wide:
            return Config(rows, 128, block_r, 8, 2)
        return Config(64, 64 if wide else 128, 16 if wide else block_r, 8 if wide else 4, 2)
    if step == "up_backward":  # columns decide how many partial dS there are: 2 r / block_k of dY's bytes
        return Config(32, 128, 16, 8, 2) if wide else Config(32, 256, 16, 8, 3)
    if step == "down_backward":
        if wide:
            return Config(32, 64, min(block_r, 32), 4, 2)
        if block_r == 32 and capability not in WARPGROUPS:  # 64 rows spill a few registers there
            return Config(32, 64, block_r, 4, 3)
        return Config(64, 128 if block_r > 32 else 64, block_r, 8 if large else 4, 3)
    raise ValueError(f"config: step is {step!r}, expected down, up, up_backward or down_backward")


def _config_of_planes(step: str, block_r: int, capability: int) -> Config:
    """The same for float32 A, B and S beside bfloat16: large tiles, as every program splits its own into planes."""
    large, warpgroups = block_r > 16, capability in WARPGROUPS  # elsewhere products take their operands from registers
    if step == "down" and large:
        return Config(128, 64, block_r, 8, 3) if warpgroups else Config(64, 32, block_r, 8, 3)
    if step == "up" and large:
        return Config(128, 128, 32, 8, 2) if warpgroups else Config(64, 64, 32, 8, 2)
    if step in ("down", "up"):
        return Config(64, 64, 16, 4, 3) if step == "down" else Config(64, 128, 16, 4, 2)
    if step == "up_backward":
        return Config(64, 128, 16, 4, 3) if warpgroups else Config(32, 128, 16, 4, 2)
    if step == "down_backward":
        return Config(32 if large or not warpgroups else 64, 128 if large else 64, block_r, 8 if large else 4, 3)
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
def bounds_of(branch_ptr, p, R, BRANCHES: tl.constexpr, ALIGN: tl.constexpr):
    """The first of branch p's columns of S and the one past its last, of which the compiler knows the alignment."""
    start, stop = tl.full((), 0, tl.int64), tl.full((), R, tl.int64)
    if BRANCHES > 1:
        start = tl.load(branch_ptr + p * FIELDS + START).to(tl.int64)
        stop = tl.load(branch_ptr + p * FIELDS + STOP).to(tl.int64)
    return aligned(start, ALIGN), aligned(stop, ALIGN)


@triton.jit
def aligned(size, ALIGN: tl.constexpr):
    """``size``, a multiple of ``ALIGN``, so that the compiler sees it: columns of S are then loaded side by side."""
    return size // ALIGN * ALIGN if ALIGN > 1 else size


@triton.jit
def _down_kernel(
    x_ptr, a_ptr, s_ptr, branch_ptr, seed_ptr,
    M, K, R, SPAN, blocks, FIRST,
    stride_xm, stride_xk, stride_ar, stride_ak, stride_sp, stride_sm, stride_sr,
    BRANCHES: tl.constexpr, DROPOUT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    pid_m, pid_r, pid_p = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    branch, start, stop = tl.full((), 0, tl.int64), tl.full((), 0, tl.int64), tl.full((), R, tl.int64)
    if DROPOUT:  # every branch has an x of its own, and programs that multiply it with the branch's columns alone
        branch, pid_r = pid_r // blocks, pid_r % blocks
        start, stop = bounds_of(branch_ptr, branch, R, BRANCHES, 1)
    r = start + pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    first = pid_p * SPAN
    k = first + tl.arange(0, BLOCK_K)
    x_tile = x_ptr + m[:, None] * stride_xm + k[None, :] * stride_xk  # [BLOCK_M, BLOCK_K]
    a_tile = a_ptr + k[:, None] * stride_ak + r[None, :] * stride_ar  # [BLOCK_K, BLOCK_R]
    acc = tl.zeros((BLOCK_M, BLOCK_R), ACC)
    step = tl.full((), BLOCK_K, tl.int64)  # times a stride: past 2**31 when columns lie far apart
    for k0 in range(first, tl.minimum(first + SPAN, K), BLOCK_K):
        k_ok = k0 + tl.arange(0, BLOCK_K) < K
        x = tl.load(x_tile, mask=(m < M)[:, None] & k_ok[None, :], other=0.0)
        a = tl.load(a_tile, mask=k_ok[:, None] & (r < stop)[None, :], other=0.0)
        if DROPOUT:
            threshold = tl.load(branch_ptr + branch * FIELDS + THRESHOLD).to(tl.int32)
            keep = keep_tile(tl.load(seed_ptr + branch), threshold, m, FIRST + k0, BLOCK_K)
            x = tl.where(keep, x, 0.0).to(x.dtype)
        acc = dot(x, a, acc, PRECISION)
        x_tile += step * stride_xk
        a_tile += step * stride_ak
    scale = tl.zeros((BLOCK_R,), ACC)
    for p in tl.static_range(BRANCHES):
        mine = columns_of(branch_ptr, p, r)
        factor = tl.load(branch_ptr + p * FIELDS + SCALE) * tl.load(branch_ptr + p * FIELDS + INVERSE_KEEP)
        scale = tl.where(mine, factor, scale)
    s_tile = s_ptr + pid_p * stride_sp + m[:, None] * stride_sm + r[None, :] * stride_sr
    tl.store(s_tile, acc * scale[None, :], mask=(m < M)[:, None] & (r < stop)[None, :])


@triton.jit
def _up_kernel(
    s_ptr, b_ptr, bias_ptr, y_ptr, branch_ptr, seed_ptr,
    M, K, R, FIRST,
    stride_sm, stride_sr, stride_bk, stride_br, stride_bias, stride_ym, stride_yk,
    BRANCHES: tl.constexpr, DROPOUT: tl.constexpr, BIAS: tl.constexpr, ALIGN: tl.constexpr, ALIGN_B: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    pid_m, pid_k = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    stride_sm, stride_bk = aligned(stride_sm, ALIGN), aligned(stride_bk, ALIGN_B)
    y = tl.zeros((BLOCK_M, BLOCK_K), ACC)
    if BIAS:
        y += tl.load(bias_ptr + k * stride_bias, mask=k < K, other=0.0).to(ACC)[None, :]
    for p in range(BRANCHES):  # not unrolled: the masks of two branches at a time take too many registers
        start, stop = bounds_of(branch_ptr, p, R, BRANCHES, ALIGN)
        acc = tl.zeros((BLOCK_M, BLOCK_K), ACC) if DROPOUT else y
        for r0 in range(start, stop, BLOCK_R):
            r = (r0 + tl.arange(0, BLOCK_R)).to(tl.int64)
            s_tile = s_ptr + m[:, None] * stride_sm + r[None, :] * stride_sr  # [BLOCK_M, BLOCK_R]
            b_tile = b_ptr + r[:, None] * stride_br + k[None, :] * stride_bk  # [BLOCK_R, BLOCK_K]
            s = tl.load(s_tile, mask=(m < M)[:, None] & (r < stop)[None, :], other=0.0)
            b = tl.load(b_tile, mask=(r < stop)[:, None] & (k < K)[None, :], other=0.0)
            acc = dot(s, b, acc, PRECISION)
        if DROPOUT:
            threshold = tl.load(branch_ptr + p * FIELDS + THRESHOLD).to(tl.int32)
            keep = keep_tile(tl.load(seed_ptr + p), threshold, m, FIRST + pid_k * BLOCK_K, BLOCK_K)
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
    first: int = 0,
) -> Tensor:
    """``scale_p · drop_p(x) A_pᵀ`` of the branches side by side: ``[M, R]`` in A's dtype, in s where it is given.

    The masks are those of columns from ``first`` on.
    """
    (m, k), rank, dropout = x.shape, a.shape[0], any(map(threshold, dropouts))
    widest = max(ranks) if dropout else rank
    acc, c = products(x, a, a.dtype), config("down", widest, a.dtype, capability(x), x.dtype)
    blocks = cdiv(widest, c.block_r)
    grid = cdiv(m, c.block_m), blocks * (len(ranks) if dropout else 1)
    parts, span = split(k, c.block_k, grid[0] * grid[1], full=dropout and c.num_warps < 8)
    if s is None:
        s = x.new_empty(m, rank, dtype=a.dtype)
    partials = x.new_empty(parts, m, rank, dtype=acc.torch) if parts > 1 else s[None]
    table = branch_table(tuple(ranks), tuple(scales), tuple(dropouts), acc.torch, x.device)
    launch(
        _down_kernel, (*grid, parts), c, acc,
        x, a, partials, table, seeds, m, k, rank, span, blocks, first, *x.stride(), *a.stride(), *partials.stride(),
        BRANCHES=len(ranks), DROPOUT=dropout,
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
    first: int = 0,
) -> Tensor:
    """``Σ_p mask_p ∘ (S_p B_pᵀ) / (1 - p_p) + bias``: ``[M, N]`` in ``dtype``; the masks' columns from ``first`` on."""
    (m, rank), k, dropout = s.shape, b.shape[0], any(map(threshold, dropouts))
    widest = max(ranks) if dropout else rank
    acc, c = products(s, b, dtype), config("up", widest, s.dtype, capability(s), dtype)
    if dropout and (len(ranks) > 1 or c.block_m > 64):  # y, one branch's product and its mask take registers
        c = replace(c, block_k=min(c.block_k, 64))
    y = s.new_empty(m, k, dtype=dtype)
    table = branch_table(tuple(ranks), (1.0,) * len(ranks), tuple(dropouts), acc.torch, s.device)
    launch(
        _up_kernel, (cdiv(m, c.block_m), cdiv(k, c.block_k)), c, acc,
        s, b, bias, y, table, seeds, m, k, rank, first,
        *s.stride(), *b.stride(), 0 if bias is None else bias.stride(0), *y.stride(),
        BRANCHES=len(ranks) if dropout else 1, DROPOUT=dropout, BIAS=bias is not None,
        ALIGN=alignment(*ranks, s.stride(0)), ALIGN_B=alignment(*ranks, b.stride(0)),
    )  # fmt: skip
    return y


def ranks_of(lora_as: Sequence[Tensor]) -> list[int]:
    """The rank of every branch."""
    return [a.shape[0] for a in lora_as]


def stacked(matrices: Sequence[Tensor]) -> Tensor:
    """The matrices of all branches, one below the other."""
    return matrices[0] if len(matrices) == 1 else torch.cat(list(matrices))
