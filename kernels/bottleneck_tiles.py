"""What the kernels of bottleneck are made of: a program's rows, the norm, the projection, the activation, the store."""

import triton
import triton.language as tl

from .bottleneck_launch import FACTOR, THRESHOLD
from .dropout import keep_tile
from .planes import dot


@triton.jit
def slot_of(tiles_ptr, pid, GROUPED: tl.constexpr):
    slot = 0
    if GROUPED:
        slot = tl.load(tiles_ptr + pid).to(tl.int64)
    return slot


@triton.jit
def rows_of(order_ptr, starts_ptr, tiles_ptr, stride_tiles, pid, slot, M, GROUPED: tl.constexpr, BLOCK_M: tl.constexpr):
    """Places of a program's rows, the rows, which exist, and their numbers in the dropout mask."""
    if GROUPED:
        m = tl.load(tiles_ptr + stride_tiles + pid).to(tl.int64) + tl.arange(0, BLOCK_M)
        m_ok = m < tl.load(starts_ptr + slot + 1)
        row = tl.load(order_ptr + m, mask=m_ok, other=0).to(tl.int64)
        drawn = m - tl.load(starts_ptr + slot)
    else:
        m = pid * BLOCK_M + tl.arange(0, BLOCK_M)
        m_ok, row, drawn = m < M, m, m
    return m, row, m_ok, drawn


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """act(z); 0 at 0."""
    if ACTIVATION == "relu":
        h = tl.where(z > 0, z, 0.0)
    elif ACTIVATION == "leaky_relu":
        h = tl.where(z > 0, z, 0.01 * z)
    elif ACTIVATION == "gelu":
        h = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        h = z * tl.sigmoid(2.0 * 0.7978845608028654 * (z + 0.044715 * z * z * z))
    elif ACTIVATION == "silu":
        h = z * tl.sigmoid(z)
    elif ACTIVATION == "tanh":
        h = tanh(z)
    else:
        h = z
    return h


@triton.jit
def tanh(z):
    t = tl.exp(-2.0 * tl.abs(z))
    h = (1.0 - t) / (1.0 + t)
    h = tl.where(z < 0, -h, h)
    if z.dtype == tl.float32:  # near 0 the difference cancels: the polynomial of Moshier's Cephes library instead
        s = z * z
        p = -5.70498872745e-3 * s + 2.06390887954e-2
        p = (p * s - 5.37397155531e-2) * s + 1.33314422036e-1
        p = (p * s - 3.33332819422e-1) * s
        h = tl.where(tl.abs(z) < 0.625, z + z * p, h)
    return h


@triton.jit
def slope(z, ACTIVATION: tl.constexpr):
    """act'(z)."""
    if ACTIVATION == "relu":
        d = tl.where(z > 0, 1.0, 0.0)
    elif ACTIVATION == "leaky_relu":
        d = tl.where(z > 0, 1.0, 0.01)
    elif ACTIVATION == "gelu":
        d = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    elif ACTIVATION == "gelu_tanh":
        s = tl.sigmoid(2.0 * 0.7978845608028654 * (z + 0.044715 * z * z * z))
        d = s + z * s * (1.0 - s) * (2.0 * 0.7978845608028654) * (1.0 + 3.0 * 0.044715 * z * z)
    elif ACTIVATION == "silu":
        s = tl.sigmoid(z)
        d = s * (1.0 + z * (1.0 - s))
    elif ACTIVATION == "tanh":
        h = tanh(z)
        d = 1.0 - h * h
    else:
        d = z * 0.0 + 1.0
    return d.to(z.dtype)


@triton.jit
def row_stats(
    x_ptr,
    row,
    m_ok,
    K,
    eps,
    stride_x,
    NORM: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Mean (0 for rms) and reciprocal deviation of each row, block by block in one pass (Chan et al., 1979)."""
    mean, square = tl.zeros((BLOCK_M,), ACC), tl.zeros((BLOCK_M,), ACC)
    for k0 in range(0, K, BLOCK_K):
        k = (k0 + tl.arange(0, BLOCK_K)).to(tl.int64)
        x_tile = x_ptr + row[:, None] * stride_x[0] + k[None, :] * stride_x[1]
        x = tl.load(x_tile, mask=m_ok[:, None] & (k < K)[None, :], other=0.0).to(ACC)
        if NORM == "layer":
            count = tl.minimum(K - k0, BLOCK_K).to(ACC)
            share = count / (k0 + count)
            part = tl.sum(x, 1) / count
            x = tl.where((k < K)[None, :], x - part[:, None], 0.0)
            delta = part - mean
            square += delta * delta * (k0 * share)
            mean += delta * share
        square += tl.sum(x * x, 1)
    return mean, 1.0 / tl.sqrt(square / K + eps)


@triton.jit
def normalised(x, mean, rstd, NORM: tl.constexpr, ACC: tl.constexpr):
    x = x.to(ACC)
    if NORM == "layer":
        x = x - mean[:, None]
    return x * rstd[:, None]


@triton.jit
def project(
    x_ptr, d_ptr, nw_ptr, nb_ptr, row, m_ok, r, mean, rstd, first, last, K, R, stride_x, stride_d, stride_nw, stride_nb,
    NORM: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """norm(x) Dᵀ over columns first ... last."""
    acc = tl.zeros((BLOCK_M, BLOCK_R), ACC)
    for k0 in range(first, last, BLOCK_K):
        k = (k0 + tl.arange(0, BLOCK_K)).to(tl.int64)
        k_ok = k < K
        x_tile = x_ptr + row[:, None] * stride_x[0] + k[None, :] * stride_x[1]  # [BLOCK_M, BLOCK_K]
        d_tile = d_ptr + k[:, None] * stride_d[2] + r[None, :] * stride_d[1]  # [BLOCK_K, BLOCK_R]
        x = tl.load(x_tile, mask=m_ok[:, None] & k_ok[None, :], other=0.0)
        d = tl.load(d_tile, mask=k_ok[:, None] & (r < R)[None, :], other=0.0)
        if NORM != "":
            x = normalised(x, mean, rstd, NORM, ACC)
            x = x * tl.load(nw_ptr + k * stride_nw[1], mask=k_ok, other=0.0).to(ACC)[None, :]
            if nb_ptr is not None:
                x += tl.load(nb_ptr + k * stride_nb[1], mask=k_ok, other=0.0).to(ACC)[None, :]
        acc = dot(x, d, acc, PRECISION)
    return acc


@triton.jit
def finish(
    u, ub_ptr, scale_ptr, res_ptr, y_ptr, seed_ptr, row, m_ok, drawn, n0, N, numbers_ptr,
    stride_ub, stride_scale, stride_res, stride_y,
    ACC: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Bias, scale, dropout and residual of one tile of h Uᵀ, and its store."""
    n = (n0 + tl.arange(0, BLOCK_K)).to(tl.int64)
    y_ok = m_ok[:, None] & (n < N)[None, :]
    if ub_ptr is not None:
        u += tl.load(ub_ptr + n * stride_ub[1], mask=n < N, other=0.0).to(ACC)[None, :]
    if scale_ptr is not None:
        u *= tl.load(scale_ptr + n * stride_scale[1], mask=n < N, other=0.0).to(ACC)[None, :]
    u *= tl.load(numbers_ptr + FACTOR)
    if DROPOUT:
        threshold = tl.load(numbers_ptr + THRESHOLD).to(tl.int32)
        u = tl.where(keep_tile(tl.load(seed_ptr), threshold, drawn, n0, BLOCK_K), u, 0.0)
    if res_ptr is not None:
        u += tl.load(res_ptr + row[:, None] * stride_res[0] + n[None, :] * stride_res[1], mask=y_ok, other=0.0).to(ACC)
    tl.store(y_ptr + row[:, None] * stride_y[0] + n[None, :] * stride_y[1], u, mask=y_ok)


@triton.jit
def add_bias(z, db_ptr, r, R, stride_db, ACC: tl.constexpr):
    if db_ptr is not None:
        z += tl.load(db_ptr + r * stride_db[1], mask=r < R, other=0.0).to(ACC)[None, :]
    return z


@triton.jit
def column_sum(x, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Over the rows of a tile, in two steps: shorter chains of additions err less."""
    return tl.sum(tl.sum(tl.reshape(x, (BLOCK_M // 4, 4, BLOCK_K)), 1), 0)
