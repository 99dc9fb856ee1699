"""Hidden values of bottleneck from sums that were cut along K and N: added in order, once, and what follows."""

import triton
import triton.language as tl
from torch import Tensor

from .bottleneck_launch import FACTOR, FINISH, ROWS, blocks_of
from .bottleneck_tiles import activate, add_bias, rows_of, slope, slot_of
from .launch import Config, Math, cdiv, launch


@triton.jit
def finish(
    z, dh, db_ptr, dw_ptr, zb_ptr, dz_ptr, h_ptr, means_ptr, m, m_ok, r, R, pid_r, numbers_ptr,
    stride_db, stride_means, stride_h, ACTIVATION: tl.constexpr, NORM: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """h = act(z), and in backward dz and its two sums over r that the norm's backward needs."""
    r_ok = r < R
    z = add_bias(z, db_ptr, r, R, stride_db, ACC)
    tile, ok = m[:, None] * stride_h[0] + r[None, :] * stride_h[1], m_ok[:, None] & r_ok[None, :]
    tl.store(h_ptr + tile, activate(z, ACTIVATION), mask=ok)
    if dz_ptr is not None:
        dz = dh * tl.load(numbers_ptr + FACTOR) * slope(z, ACTIVATION)
        tl.store(dz_ptr + tile, dz, mask=ok)
        if NORM != "":  # the sums over k of dẑ and of dẑ ∘ x̂; those over other blocks of r are added later
            dw, zb = tl.load(dw_ptr + r, mask=r_ok, other=0.0), tl.load(zb_ptr + r, mask=r_ok, other=0.0)
            means_tile = means_ptr + pid_r * 2 * stride_means + m
            tl.store(means_tile, tl.sum(dz * dw[None, :], 1), mask=m_ok)
            tl.store(means_tile + stride_means, tl.sum(dz * (z - zb[None, :]), 1), mask=m_ok)


@triton.jit
def _finish_kernel(
    z_ptr, dh_ptr, db_ptr, dw_ptr, zb_ptr, dz_ptr, h_ptr, means_ptr, order_ptr, starts_ptr, tiles_ptr,
    M, R, parts, numbers_ptr, stride_tiles, stride_zb, stride_means, stride_db, stride_z, stride_h,
    ACTIVATION: tl.constexpr, NORM: tl.constexpr, GROUPED: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    pid_m, pid_r = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    slot = slot_of(tiles_ptr, pid_m, GROUPED)
    if slot < 0:
        return
    m, _, m_ok, _ = rows_of(order_ptr, starts_ptr, tiles_ptr, stride_tiles, pid_m, slot, M, GROUPED, BLOCK_M)
    r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    tile, ok = m[:, None] * stride_z[1] + r[None, :] * stride_z[2], m_ok[:, None] & (r < R)[None, :]
    z, dh = tl.zeros((BLOCK_M, BLOCK_R), ACC), tl.zeros((BLOCK_M, BLOCK_R), ACC)
    for p in range(0, parts):  # not unrolled for each number of them: another number of rows compiles nothing
        part = tl.full((), p, tl.int64) * stride_z[0]
        z += tl.load(z_ptr + part + tile, mask=ok, other=0.0)
        if dh_ptr is not None:
            dh += tl.load(dh_ptr + part + tile, mask=ok, other=0.0)
    finish(
        z, dh, db_ptr if db_ptr is None else db_ptr + slot * stride_db[0],
        dw_ptr if dw_ptr is None else dw_ptr + slot * stride_zb,
        zb_ptr if zb_ptr is None else zb_ptr + slot * stride_zb,
        dz_ptr, h_ptr, means_ptr, m, m_ok, r, R, pid_r, numbers_ptr, stride_db, stride_means, stride_h,
        ACTIVATION, NORM, ACC,
    )  # fmt: skip


def add_parts(
    parts: tuple[Tensor, Tensor | None],
    tensors: tuple[Tensor | None, ...],
    numbers: Tensor,
    stride_db: tuple[int, ...],
    routing,
    acc: Math,
    activation: str,
    norm: str,
) -> None:
    """Write h, and in backward dz and the means, from z and dh as ``[parts, M, H]``.

    ``tensors``: the bias, dw and zb of the norm's backward, then dz, h and the means ``[H / FINISH, 2, M]``.
    """
    (z, dh), (*_, h, _) = parts, tensors
    count, m, hidden = z.shape
    rows = FINISH if routing is None else min(ROWS, routing.tile)
    blocks, tables, stride_tiles = blocks_of(m, rows, routing)
    launch(
        _finish_kernel, (blocks, cdiv(hidden, FINISH)), Config(rows, FINISH, FINISH, 4, 1), acc,
        z, dh, *tensors, *tables, m, hidden, count, numbers, stride_tiles, hidden, m, stride_db, z.stride(), h.stride(),
        ACTIVATION=activation, NORM=norm, GROUPED=routing is not None,
    )  # fmt: skip
