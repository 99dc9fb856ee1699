"""The weight gradient of chosen rows: ``G = dY[:, index]ᵀ x``; the columns of dY are gathered once, side by side.

Alphabet: x [M, K] and dY [M, N] have rows m; G [R, K] has rows r, of which row r belongs to dY's column index[r]. A
number of a column costs 32 bytes to read, and every block of k needs all of them. Without an index the same product is
the gradient of chosen columns, whose x has been gathered in forward. Sums over m that are cut into parts go through
partial results added in a fixed order.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .launch import WARPGROUPS, Config, capability, cdiv, launch, math, next_power_of_2, run, split
from .partials import reduce_partials

_COLUMN_BLOCK = 32  # rows and columns of dY that a program gathers


def config(rows: int, dtype: torch.dtype, capability: int) -> Config:
    """The tile sizes for so many chosen rows of x's dtype: by shape, dtype and capability, never by a GPU's name."""
    block_r = min(max(16, next_power_of_2(rows)), 64)
    if capability in WARPGROUPS and rows > 64 and dtype.itemsize == 2:  # x is read again for every block of rows
        return Config(64, 128, 128, 8, 3)
    if dtype.itemsize > 2:  # float32 tiles take twice the shared memory and registers
        return Config(32, 64, min(block_r, 32), 4, 2)
    return Config(64, 64, block_r, 8 if block_r > 32 else 4, 3)  # 128 columns, or 4 warps, spill


@triton.jit
def _column_kernel(
    dy_ptr, index_ptr, c_ptr,
    M, N, R,
    stride_ym, stride_yn, stride_index, stride_cm, stride_cr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    pid_m, pid_r = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    n = tl.load(index_ptr + r * stride_index, mask=r < R, other=0)
    n_ok = (r < R) & (n >= 0) & (n < N)
    dy_tile = dy_ptr + m[:, None] * stride_ym + n[None, :] * stride_yn
    dy = tl.load(dy_tile, mask=(m < M)[:, None] & n_ok[None, :], other=0.0)  # [BLOCK_M, BLOCK_R]
    c_tile = c_ptr + m[:, None] * stride_cm + r[None, :] * stride_cr
    tl.store(c_tile, dy, mask=(m < M)[:, None] & (r < R)[None, :])


@triton.jit
def _gathered_outer_kernel(
    dy_ptr, x_ptr, g_ptr,
    M, K, R, SPAN,
    stride_ym, stride_yr, stride_xm, stride_xk, stride_gp, stride_gr, stride_gk,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    pid_k, pid_r, pid_p = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_R, BLOCK_K), ACC)
    first = pid_p * SPAN
    for m0 in range(first, tl.minimum(first + SPAN, M), BLOCK_M):
        m = (m0 + tl.arange(0, BLOCK_M)).to(tl.int64)
        dy_tile = dy_ptr + m[:, None] * stride_ym + r[None, :] * stride_yr
        x_tile = x_ptr + m[:, None] * stride_xm + k[None, :] * stride_xk
        dy = tl.load(dy_tile, mask=(m < M)[:, None] & (r < R)[None, :], other=0.0)  # [BLOCK_M, BLOCK_R]
        x = tl.load(x_tile, mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        acc = tl.dot(tl.trans(dy), x, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    g_tile = g_ptr + pid_p * stride_gp + r[:, None] * stride_gr + k[None, :] * stride_gk
    tl.store(g_tile, acc, mask=(r < R)[:, None] & (k < K)[None, :])


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x Wᵀ + bias``: PyTorch's GEMM in every backend, since the live weight holds the trained part."""
    return F.linear(x, weight, bias)


def backward(dy: Tensor, x: Tensor, index: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The trained part's gradient in ``dtype``.

    ``dY[:, index]ᵀ x`` ``[n, K]`` for rows; an index outside dY's columns gives a row of zeros. Without an index
    ``dYᵀ x`` ``[N, n]``, for columns: x then holds the chosen ones alone.
    """
    return _outer(dy if index is None else _columns(dy, index), x, dtype)


def _columns(dy, index):
    """``dY[:, index]`` ``[M, n]``, zeros for an index that is no column; rows begin where wide loads can."""
    (m, n), rows = dy.shape, index.shape[0]
    columns = dy.new_empty(m, cdiv(rows, 16) * 16)[:, :rows]
    grid = cdiv(m, _COLUMN_BLOCK), cdiv(rows, _COLUMN_BLOCK)
    if 0 not in grid:
        run(
            _column_kernel, grid, dy, index, columns, m, n, rows, *dy.stride(), index.stride(0), *columns.stride(),
            BLOCK_M=_COLUMN_BLOCK, BLOCK_R=_COLUMN_BLOCK,
        )  # fmt: skip
    return columns


def _outer(dy, x, dtype):
    """``dYᵀ x`` ``[R, K]`` in ``dtype``."""
    (m, k), rows, acc = x.shape, dy.shape[1], math(x, x)
    c = config(rows, x.dtype, capability(x))
    grid = cdiv(k, c.block_k), cdiv(rows, c.block_r)
    parts, span = split(m, c.block_m, grid[0] * grid[1])
    g = x.new_empty(parts, rows, k, dtype=acc.torch if parts > 1 else dtype)
    launch(
        _gathered_outer_kernel, (*grid, parts), c, acc,
        dy, x, g, m, k, rows, span, *dy.stride(), *x.stride(), *g.stride(),
    )  # fmt: skip
    return reduce_partials(g, dtype)


def describe(x: Tensor, trained: Tensor, columns: bool) -> list[str]:
    """The kernel configuration of a call, for ``fastpeft.explain``."""
    return [f"gradient: {config(trained.shape[0], x.dtype, capability(x))}"]
