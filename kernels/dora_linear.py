"""What lies between the products of DoRA around a linear layer; the products are lora_linear's and cuBLAS's.

    masked           mask ∘ x                                one read of x, one write
    add_masked_      dx += mask ∘ q                          one read of both, one write
    combined         S Cᵀ + bias + factor ∘ u + y             one read of u and y, one write
    scaled           factor ∘ dy                             one read of dy, one write
    gain_gradient    Σ dy ∘ u over the rows                  one read of both; partial sums, added in a fixed order

Alphabet: rows m, columns k; ``x``, ``q``, ``dx`` ``[M, K]`` and ``y``, ``u``, ``dy`` ``[M, N]`` all have M rows and
K columns here, any strides. All is computed in float32 (float64 for gradcheck) and rounded once.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._mask import threshold
from .dropout import keep_tile
from .launch import Tile, alignment, capability, cdiv, launch, math, next_power_of_2, run, split
from .lora_linear_products import aligned
from .lora_linear_products import config as linear_config
from .partials import sum_into
from .planes import dot, products


def config(columns: int) -> Tile:
    """The tile for so many columns: 2048 elements, 16 bytes at a time for each thread. Not yet measured."""
    block_k = min(max(16, next_power_of_2(columns)), 256)
    return Tile(2048 // block_k, block_k)


@triton.jit
def _masked_kernel(
    x_ptr, y_ptr, seed_ptr, M, K, threshold, FIRST,
    stride_xm, stride_xk, stride_ym, stride_yk,
    ADD: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(1).to(tl.int64) * BLOCK_K
    k = first + tl.arange(0, BLOCK_K)
    inside = (m < M)[:, None] & (k < K)[None, :]  # [BLOCK_M, BLOCK_K]
    x = tl.load(x_ptr + m[:, None] * stride_xm + k[None, :] * stride_xk, mask=inside, other=0.0).to(ACC)
    y_tile = y_ptr + m[:, None] * stride_ym + k[None, :] * stride_yk
    y = tl.where(keep_tile(tl.load(seed_ptr), threshold, m, FIRST + first, BLOCK_K), x, 0.0)
    if ADD:
        y += tl.load(y_tile, mask=inside, other=0.0).to(ACC)
    tl.store(y_tile, y, mask=inside)


@triton.jit
def _scaled_kernel(
    x_ptr, y_ptr, factor_ptr, M, K,
    stride_xm, stride_xk, stride_ym, stride_yk,
    ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(1).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (m < M)[:, None] & (k < K)[None, :]  # [BLOCK_M, BLOCK_K]
    x = tl.load(x_ptr + m[:, None] * stride_xm + k[None, :] * stride_xk, mask=inside, other=0.0).to(ACC)
    y_tile = y_ptr + m[:, None] * stride_ym + k[None, :] * stride_yk
    tl.store(y_tile, x * tl.load(factor_ptr + k, mask=k < K, other=0.0).to(ACC)[None, :], mask=inside)


@triton.jit
def _combined_kernel(
    s_ptr, c_ptr, bias_ptr, u_ptr, factor_ptr, y_ptr, out_ptr,
    M, K, R,
    stride_sm, stride_sr, stride_ck, stride_cr, stride_bias, stride_um, stride_uk, stride_ym, stride_yk,
    stride_om, stride_ok,
    BIAS: tl.constexpr, ADD: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(1).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    stride_sm, stride_ck = aligned(stride_sm, ALIGN), aligned(stride_ck, ALIGN)
    acc = tl.zeros((BLOCK_M, BLOCK_K), ACC)
    for r0 in range(0, R, BLOCK_R):
        r = (r0 + tl.arange(0, BLOCK_R)).to(tl.int64)
        s_tile = s_ptr + m[:, None] * stride_sm + r[None, :] * stride_sr  # [BLOCK_M, BLOCK_R]
        c_tile = c_ptr + r[:, None] * stride_cr + k[None, :] * stride_ck  # [BLOCK_R, BLOCK_K]
        s = tl.load(s_tile, mask=(m < M)[:, None] & (r < R)[None, :], other=0.0)
        c = tl.load(c_tile, mask=(r < R)[:, None] & (k < K)[None, :], other=0.0)
        acc = dot(s, c, acc, PRECISION)
    inside = (m < M)[:, None] & (k < K)[None, :]  # [BLOCK_M, BLOCK_K]
    factor = tl.load(factor_ptr + k, mask=k < K, other=0.0).to(ACC)[None, :]
    u = tl.load(u_ptr + m[:, None] * stride_um + k[None, :] * stride_uk, mask=inside, other=0.0)
    acc += factor * u.to(ACC)
    if BIAS:
        acc += tl.load(bias_ptr + k * stride_bias, mask=k < K, other=0.0).to(ACC)[None, :]
    if ADD:
        y = tl.load(y_ptr + m[:, None] * stride_ym + k[None, :] * stride_yk, mask=inside, other=0.0)
        acc += y.to(ACC)
    tl.store(out_ptr + m[:, None] * stride_om + k[None, :] * stride_ok, acc, mask=inside)


@triton.jit
def _gain_kernel(
    dy_ptr, u_ptr, part_ptr, M, K, SPAN,
    stride_dm, stride_dk, stride_um, stride_uk,
    ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    part = tl.program_id(1).to(tl.int64)
    total = tl.zeros((BLOCK_K,), ACC)
    for m0 in range(part * SPAN, tl.minimum(part * SPAN + SPAN, M), BLOCK_M):
        m = (m0 + tl.arange(0, BLOCK_M)).to(tl.int64)
        inside = (m < M)[:, None] & (k < K)[None, :]  # [BLOCK_M, BLOCK_K]
        dy = tl.load(dy_ptr + m[:, None] * stride_dm + k[None, :] * stride_dk, mask=inside, other=0.0).to(ACC)
        u = tl.load(u_ptr + m[:, None] * stride_um + k[None, :] * stride_uk, mask=inside, other=0.0).to(ACC)
        total += tl.sum(dy * u, 0)
    tl.store(part_ptr + part * K + k, total, mask=k < K)


def masked(x: Tensor, dropout: float, seeds: Tensor) -> Tensor:
    """``mask ∘ x``, without the factor ``1 / (1 - p)``: every bit of what is kept is x's."""
    y = x.new_empty(x.shape)
    _launch(_masked_kernel, x, y, (seeds,), (threshold(dropout), 0), ADD=False)
    return y


def add_masked_(dx: Tensor, q: Tensor, dropout: float, seeds: Tensor, first: int = 0) -> None:
    """``dx += mask ∘ q``; these may be some columns, of which ``first``, an even number, is the first."""
    _launch(_masked_kernel, q, dx, (seeds,), (threshold(dropout), first), ADD=True)


def combined(s: Tensor, c: Tensor, bias: Tensor | None, u: Tensor, factor: Tensor, y: Tensor | None = None) -> Tensor:
    """``S Cᵀ + bias + factor ∘ u + y`` in u's dtype, a factor for each column."""
    (m, rank), k = s.shape, c.shape[0]
    acc, tile = products(s, c, u.dtype), linear_config("up", rank, s.dtype, capability(s), u.dtype)
    tile = replace(tile, block_m=min(tile.block_m, 64), block_k=min(tile.block_k, 64))  # u and y take registers too
    out = u.new_empty(m, k)
    launch(
        _combined_kernel, (cdiv(m, tile.block_m), cdiv(k, tile.block_k)), tile, acc,
        s, c, bias, u, factor, y, out, m, k, rank,
        *s.stride(), *c.stride(), 0 if bias is None else bias.stride(0), *u.stride(),
        *((0, 0) if y is None else y.stride()), *out.stride(),
        BIAS=bias is not None, ADD=y is not None, ALIGN=alignment(rank, s.stride(0), c.stride(0)),
    )  # fmt: skip
    return out


def scaled(dy: Tensor, factor: Tensor) -> Tensor:
    """``factor ∘ dy``, in dy's dtype."""
    y = dy.new_empty(dy.shape)
    _launch(_scaled_kernel, dy, y, (factor,))
    return y


def gain_gradient(dy: Tensor, u: Tensor, dtype: torch.dtype) -> Tensor:
    """``Σ dy ∘ u`` over the rows, in ``dtype``."""
    (m, k), c = dy.shape, config(dy.shape[1])
    parts, span = split(m, c.block_m, cdiv(k, c.block_k))
    total = dy.new_empty(k, dtype=dtype)
    partials = dy.new_empty(parts, k, dtype=dtype) if parts > 1 else total[None]
    if k:
        run(
            _gain_kernel, (cdiv(k, c.block_k), parts), dy, u, partials, m, k, span, *dy.stride(), *u.stride(),
            ACC=math(dy, dy).triton, **(c.options | {"num_stages": 2}),
        )  # fmt: skip
    if parts > 1:
        sum_into(partials, total)
    return total


def _launch(kernel, x: Tensor, y: Tensor, tables: tuple[Tensor, ...], numbers: tuple[int, ...] = (), **flags) -> None:
    (m, k), c = x.shape, config(x.shape[1])
    grid = cdiv(m, c.block_m), cdiv(k, c.block_k)
    if 0 in grid:
        return
    run(
        kernel, grid, x, y, *tables, m, k, *numbers, *x.stride(), *y.stride(), **flags, ACC=math(x, x).triton,
        **c.options,
    )  # fmt: skip


def describe(x: Tensor, lora_as, weights=(), *_) -> list[str]:
    """The kernel configuration of a call, for ``fastpeft.explain``."""
    columns = {x.shape[-1], *(weight.shape[0] for weight in weights)}
    return [f"{k} columns: {config(k)}" for k in sorted(columns)] + ["the products as lora_linear"]
