"""The products of multi_lora that forward and backward share, and the tile sizes of all its kernels.

    shrink    S  = scale · drop(x) Aᵀ, and dS = scale · dY B      one read of x for all slices
    expand    y += S Bᵀ, and dX = mask ∘ (dS A) / (1 - p)         float32 sum, one rounding

See ``multi_lora.py`` for the alphabet.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _mask
from .dropout import keep_tile
from .launch import Config, alignment, cdiv, launch, next_power_of_2
from .lora_linear_products import aligned
from .planes import HALVES, SPLIT, dot, products

_LANES = tl.constexpr(_mask.LANES)
DECODE = 16  # tokens a tile where weights, not tokens, are what there is to read


def config(
    step: str, columns: int, dtype: torch.dtype, tile: int, dropout: bool = False, split: bool = False
) -> Config:
    """The tile sizes of ``step`` for S with so many columns and tiles of ``tile`` tokens: the largest without spills.

    Dropout's masks take registers too; one more pipeline stage or fewer decides on some architectures. ``split``: what
    is float32 is multiplied as planes of bfloat16.
    """
    block_r = min(max(16, next_power_of_2(columns)), 64)
    wide = dtype.itemsize > 2  # float32 tiles take twice the shared memory, and three TF32 terms more registers
    if step == "shrink":
        if wide:
            if dropout:
                return Config(tile, 32, block_r, 4, 1)
            return Config(tile, 32, block_r, 4 if split or tile <= DECODE else 8, 3)
        return Config(tile, 128 if tile <= DECODE and block_r < 64 else 64, block_r, 4, 3)
    if step == "expand":
        if dropout:
            block_k = 32 if wide else 128 if tile <= DECODE else 64
            return Config(tile, block_k, 16 if wide else min(block_r, 32), 4 if wide else 8, 2)
        if not split or columns % 8:  # three terms of TF32, or numbers loaded one by one, take registers
            return Config(tile, 64, 16, 4 if tile <= DECODE else 8, 2)
        if tile <= DECODE:  # as many columns as let the programs of 32 tokens run at once, the sums of S added by few
            return Config(tile, 128 if wide else 256, 16, 4, 1)
        return Config(tile, 64 if wide else 128, 16, 4, 2)
    if step == "outer":
        if wide:
            return Config(32, 64, min(block_r, 32), 8, 2)
        large = block_r > 32
        narrow = dropout or columns % 8 > 0  # a mask, or numbers loaded one by one, take registers
        return Config(32, 64 if narrow else 128, block_r, 8 if large else 4, 3 if large or narrow else 2)
    raise ValueError(f"config: step is {step!r}, expected shrink, expand or outer")


def planes(k: int, tile: int, dtype: torch.dtype) -> int:
    """Into how many sums x's columns are cut: by nothing else, so that a token's bits do not depend on the batch."""
    if tile > DECODE:
        return min(4, cdiv(k, 1024))
    # Whoever expands S adds them: few, unless the adapters are float32, whose products take longer than these sums.
    return min(8 if dtype.itemsize > 2 else 4, cdiv(k, 256))


@triton.jit
def rank_of(rank_ptr, index, largest, RANKS: tl.constexpr):
    """A slot's true rank; a table that claims more than there is, or less than none, is not believed."""
    rank = largest
    if RANKS:
        rank = tl.minimum(tl.maximum(tl.load(rank_ptr + index), 0), largest)
    return rank


@triton.jit
def _tile(order_ptr, starts_ptr, slot, m, T):
    """The place of a slot's first token, a tile's tokens, and which of them exist; no load waits for another."""
    token = tl.load(order_ptr + m, mask=m < T, other=0).to(tl.int64)
    return tl.load(starts_ptr + slot).to(tl.int64), token, m < tl.load(starts_ptr + slot + 1)


@triton.jit
def _shrink_kernel(
    x_ptr, a_ptrs, s_ptr, order_ptr, starts_ptr, tiles_ptr, scale_ptr, rank_ptr, threshold_ptr, seed_ptr,
    stride_tiles, T, K, SPAN, firsts, sizes, stride_scale, stride_rank, stride_seed,
    stride_xm, stride_xk, strides_as, strides_ar, strides_ak, stride_sp, stride_sm, stride_sr,
    SLICES: tl.constexpr, RANKS: tl.constexpr, DROPOUT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    pid_m, pid_r, pid_p = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    slot, place = tl.load(tiles_ptr + pid_m).to(tl.int64), tl.load(tiles_ptr + stride_tiles + pid_m).to(tl.int64)
    if tl.minimum(slot, place) < 0:  # of a tile that is not used both may be; asked so, both loads are one wait
        return
    m = place + tl.arange(0, BLOCK_M)
    start, token, m_ok = _tile(order_ptr, starts_ptr, slot, m, T)
    column = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    first = pid_p * SPAN
    k = first + tl.arange(0, BLOCK_K)
    x_tile = x_ptr + token[:, None] * stride_xm + k[None, :] * stride_xk  # [BLOCK_M, BLOCK_K]
    # Columns of several slices lie in one tile of A: each takes its pointer, step, rank and scale from its own slice.
    a_tile = a_ptrs[0] + slot * strides_as[0] + k[:, None] * strides_ak[0] + column[None, :] * strides_ar[0]
    block_k = tl.full((BLOCK_R,), BLOCK_K, tl.int64)  # times a stride: past 2**31 when columns lie far apart
    step = block_k * strides_ak[0]
    r_ok = column < rank_of(rank_ptr, slot, sizes[0], RANKS)
    scale = tl.full((BLOCK_R,), 1.0, ACC) * tl.load(scale_ptr + slot)
    for p in tl.static_range(1, SLICES):
        mine, r = column >= firsts[p], column - firsts[p]
        other = a_ptrs[p] + slot * strides_as[p] + k[:, None] * strides_ak[p] + r[None, :] * strides_ar[p]
        a_tile = tl.where(mine[None, :], other, a_tile)  # [BLOCK_K, BLOCK_R]
        step = tl.where(mine, block_k * strides_ak[p], step)
        r_ok = tl.where(mine, r < rank_of(rank_ptr, p * stride_rank + slot, sizes[p], RANKS), r_ok)
        scale = tl.where(mine, tl.load(scale_ptr + p * stride_scale + slot), scale)
    if tl.sum(r_ok.to(tl.int32), 0) == 0:
        return
    acc = tl.zeros((BLOCK_M, BLOCK_R), ACC)
    x_step = tl.full((), BLOCK_K, tl.int64) * stride_xk
    for k0 in range(first, tl.minimum(first + SPAN, K), BLOCK_K):
        k_ok = k0 + tl.arange(0, BLOCK_K) < K
        x = tl.load(x_tile, mask=m_ok[:, None] & k_ok[None, :], other=0.0)
        a = tl.load(a_tile, mask=k_ok[:, None] & r_ok[None, :], other=0.0)
        if DROPOUT:
            threshold = tl.load(threshold_ptr + slot)
            for p in tl.static_range(SLICES):
                keep = keep_tile(tl.load(seed_ptr + p * stride_seed + slot), threshold, m - start, k0, BLOCK_K)
                mine = (column >= firsts[p]) & (column < firsts[p] + sizes[p])
                a_p = tl.where(mine[None, :], a, 0.0).to(a.dtype)
                kept = tl.where(keep, x, 0.0).to(x.dtype)
                acc = dot(kept, a_p, acc, PRECISION)
        else:
            acc = dot(x, a, acc, PRECISION)
        x_tile += x_step
        a_tile += step[None, :]
    if DROPOUT:
        scale = scale * inverse_keep_of(threshold_ptr, slot, ACC)
    s_tile = s_ptr + pid_p * stride_sp + m[:, None] * stride_sm + column[None, :] * stride_sr
    tl.store(s_tile, acc * scale[None, :], mask=m_ok[:, None] & r_ok[None, :])


@triton.jit
def inverse_keep_of(threshold_ptr, slot, ACC: tl.constexpr):
    """1 / (1 - p) of a slot."""
    kept = tl.full((), _LANES, tl.int32) - tl.load(threshold_ptr + slot)
    return tl.full((), _LANES, ACC) / kept.to(ACC)


@triton.jit
def _low_rank(
    s_ptr, b_ptr, m, m_ok, k, N, rank, stride_sp, stride_sm, stride_sr, stride_bk, stride_br,
    PLANES: tl.constexpr, ALIGN: tl.constexpr, ALIGN_B: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    acc = tl.zeros((BLOCK_M, BLOCK_K), ACC)
    stride_sm, stride_bk = aligned(stride_sm, ALIGN), aligned(stride_bk, ALIGN_B)
    for r0 in range(0, rank, BLOCK_R):
        r = (r0 + tl.arange(0, BLOCK_R)).to(tl.int64)
        s_tile = s_ptr + m[:, None] * stride_sm + r[None, :] * stride_sr  # [BLOCK_M, BLOCK_R]
        b_tile = b_ptr + r[:, None] * stride_br + k[None, :] * stride_bk  # [BLOCK_R, BLOCK_K]
        # Whole loads, of which what lies past the true rank is not used.
        s_ok = m_ok[:, None] & (aligned(r, ALIGN) < rank)[None, :]
        b = tl.load(b_tile, mask=(aligned(r, ALIGN_B) < rank)[:, None] & (k < N)[None, :], other=0.0)
        s = tl.load(s_tile, mask=s_ok, other=0.0)
        for plane in tl.static_range(1, PLANES):
            s += tl.load(s_tile + tl.full((), plane, tl.int64) * stride_sp, mask=s_ok, other=0.0)
        if ALIGN > 1:
            s = tl.where((r < rank)[None, :], s, 0.0)
        if ALIGN_B > 1:
            b = tl.where((r < rank)[:, None], b, 0.0)
        acc = dot(s, b if PRECISION == HALVES else b.to(ACC), acc, PRECISION)
    return acc


@triton.jit
def _expand_kernel(
    s_ptr, b_ptrs, y_ptrs, order_ptr, starts_ptr, tiles_ptr, rank_ptr, threshold_ptr, seed_ptr,
    stride_tiles, T, firsts, sizes, widths, blocks, stride_rank, stride_seed,
    stride_sp, stride_sm, stride_sr, strides_bs, strides_bk, strides_br, strides_ym, strides_yk,
    SLICES: tl.constexpr, SUM: tl.constexpr, PLANES: tl.constexpr, RANKS: tl.constexpr, DROPOUT: tl.constexpr,
    ALIGN: tl.constexpr, ALIGN_B: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    pid_m, pid_k = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    slot, place = tl.load(tiles_ptr + pid_m).to(tl.int64), tl.load(tiles_ptr + stride_tiles + pid_m).to(tl.int64)
    if tl.minimum(slot, place) < 0:  # of a tile that is not used both may be; asked so, both loads are one wait
        return
    m = place + tl.arange(0, BLOCK_M)
    start, token, m_ok = _tile(order_ptr, starts_ptr, slot, m, T)
    total = tl.zeros((BLOCK_M, BLOCK_K), ACC)
    for p in tl.static_range(SLICES):
        block = pid_k if SUM else pid_k - blocks[p]
        if (block >= 0) & (block * BLOCK_K < widths[p]):  # always so in a sum
            k = block * BLOCK_K + tl.arange(0, BLOCK_K)
            if not SUM:  # asked for before the products, not after
                y_tile = y_ptrs[p] + token[:, None] * strides_ym[p] + k[None, :] * strides_yk[p]
                y_ok = m_ok[:, None] & (k < widths[p])[None, :]
                y = tl.load(y_tile, mask=y_ok, other=0.0)
            acc = _low_rank(
                s_ptr + firsts[p] * stride_sr, b_ptrs[p] + slot * strides_bs[p], m, m_ok, k, widths[p],
                rank_of(rank_ptr, p * stride_rank + slot, sizes[p], RANKS),
                stride_sp, stride_sm, stride_sr, strides_bk[p], strides_br[p],
                PLANES, ALIGN, ALIGN_B, ACC, PRECISION, BLOCK_M, BLOCK_K, BLOCK_R,
            )  # fmt: skip
            if DROPOUT:
                seed, threshold = tl.load(seed_ptr + p * stride_seed + slot), tl.load(threshold_ptr + slot)
                keep = keep_tile(seed, threshold, m - start, block * BLOCK_K, BLOCK_K)
                acc = tl.where(keep, acc * inverse_keep_of(threshold_ptr, slot, ACC), 0.0)
            if SUM:
                total += acc
            else:
                tl.store(y_tile, y.to(ACC) + acc, mask=y_ok)
    if SUM:
        k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
        y_tile = y_ptrs[0] + token[:, None] * strides_ym[0] + k[None, :] * strides_yk[0]
        tl.store(y_tile, total, mask=m_ok[:, None] & (k < widths[0])[None, :])


def write_shrunk(x: Tensor, lora_as: Sequence[Tensor], s: Tensor, routing, slots) -> None:
    """Write ``scale_p · drop_p(x) A_pᵀ`` of each token's slot into ``s [planes, T, R]``, K cut into as many parts."""
    k, columns, acc = x.shape[1], s.shape[2], products(x, lora_as[0], s.dtype)
    split = acc.precision in SPLIT
    c = config("shrink", columns, lora_as[0].dtype, routing.tile, slots.thresholds is not None, split)
    span = cdiv(cdiv(k, s.shape[0]), c.block_k) * c.block_k
    tiles, ranks = routing.tiles.shape[1], ranks_of(lora_as)
    launch(
        _shrink_kernel, (tiles, cdiv(columns, c.block_r), s.shape[0]), c, acc,
        x, tuple(lora_as), s, routing.order, routing.starts, routing.tiles, *slots,
        routing.tiles.stride(0), x.shape[0], k, span, _firsts(ranks), tuple(ranks), *_strides(slots),
        *x.stride(), *_transposed(lora_as), *s.stride(),
        SLICES=len(lora_as), RANKS=slots.ranks is not None, DROPOUT=slots.thresholds is not None,
    )  # fmt: skip


def add_expanded(ys: Sequence[Tensor], s: Tensor, lora_bs: Sequence[Tensor], routing, slots, total: bool) -> None:
    """``y_p += mask_p ∘ (S_p B_pᵀ) / (1 - p)`` in place; with ``total`` y is written, as the sum over the slices."""
    widths, ranks = tuple(b.shape[1] for b in lora_bs), [b.shape[2] for b in lora_bs]
    acc, dropout = products(s, lora_bs[0], ys[0].dtype), slots.thresholds is not None
    c = config("expand", max(ranks), lora_bs[0].dtype, routing.tile, dropout, acc.precision in SPLIT)
    blocks, tiles = [cdiv(width, c.block_k) for width in widths], routing.tiles.shape[1]
    align_b = alignment(*ranks, *(b.stride(1) for b in lora_bs)) if all(b.stride(2) == 1 for b in lora_bs) else 1
    launch(
        _expand_kernel, (tiles, blocks[0] if total else sum(blocks)), c, acc,
        s, tuple(lora_bs), tuple(ys), routing.order, routing.starts, routing.tiles, *slots[1:],
        routing.tiles.stride(0), ys[0].shape[0], _firsts(ranks), tuple(ranks), widths, _firsts(blocks),
        *_strides(slots)[1:], *s.stride(), *_transposed(lora_bs), *zip(*(y.stride() for y in ys), strict=True),
        SLICES=len(lora_bs), SUM=total, PLANES=s.shape[0], RANKS=slots.ranks is not None, DROPOUT=dropout,
        ALIGN=min(8, alignment(*ranks, s.stride(1))), ALIGN_B=min(8, align_b),
    )  # fmt: skip


def ranks_of(lora_as: Sequence[Tensor]) -> list[int]:
    """R of every slice."""
    return [a.shape[1] for a in lora_as]


def _firsts(sizes: Sequence[int]) -> tuple[int, ...]:
    return tuple(sum(sizes[:p]) for p in range(len(sizes)))


def _transposed(tensors: Sequence[Tensor]) -> list[tuple[int, ...]]:
    """Strides of each dimension, over the slices."""
    return list(zip(*(t.stride() for t in tensors), strict=True))


def _strides(slots) -> list[int]:
    """From one slice's scales, ranks and seeds to the next's."""
    return [
        0 if table is None or table.dim() == 1 else table.stride(0)
        for table in (slots.scales, slots.ranks, slots.seeds)
    ]
