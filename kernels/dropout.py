"""The dropout mask of fastpeft.reference.dropout, drawn tile by tile in registers; nothing is stored.

Integers are unsigned and wrap. The two keys of a row are loop-invariant: the compiler lifts them out of column loops.
"""

import triton
import triton.language as tl

from .. import _mask

_ROW_STEP, _PAIR_STEP = tl.constexpr(_mask.ROW_STEP), tl.constexpr(_mask.PAIR_STEP)
_ROW_FACTOR_1, _ROW_FACTOR_2 = map(tl.constexpr, _mask.ROW_FACTORS)
_PAIR_FACTOR_1, _PAIR_FACTOR_2 = map(tl.constexpr, _mask.PAIR_FACTORS)
_ROW_SHIFT_1, _ROW_SHIFT_2, _ROW_SHIFT_3 = map(tl.constexpr, _mask.ROW_SHIFTS)
_PAIR_SHIFT_1, _PAIR_SHIFT_2 = map(tl.constexpr, _mask.PAIR_SHIFTS)
_HALF = tl.constexpr(_mask.LANES // 2)


@triton.jit
def _row_keys(seed, m):
    """splitmix64 of row numbers ``m`` [BLOCK_M], as low and high 32-bit halves."""
    z = seed.to(tl.uint64) + (m + 1).to(tl.uint64) * _ROW_STEP
    z = (z ^ (z >> _ROW_SHIFT_1)) * _ROW_FACTOR_1
    z = (z ^ (z >> _ROW_SHIFT_2)) * _ROW_FACTOR_2
    z = z ^ (z >> _ROW_SHIFT_3)
    return z.to(tl.uint32), (z >> 32).to(tl.uint32)


@triton.jit
def keep_tile(seed, threshold, m, first_k, BLOCK_K: tl.constexpr):
    """True where an element is kept: rows ``m`` [BLOCK_M], columns first_k ... first_k + BLOCK_K (first_k is even)."""
    lo, hi = _row_keys(seed, m)
    j = (first_k // 2 + tl.arange(0, BLOCK_K // 2)).to(tl.uint32)
    z = ((j * _PAIR_STEP)[None, :] ^ lo[:, None]) * _PAIR_FACTOR_1  # [BLOCK_M, BLOCK_K / 2]
    z = ((z ^ (z >> _PAIR_SHIFT_1)) + hi[:, None]) * _PAIR_FACTOR_2
    z = z ^ (z >> _PAIR_SHIFT_2)
    even = (z << 16).to(tl.int32, bitcast=True) >> 16  # sign-extended halves
    odd = z.to(tl.int32, bitcast=True) >> 16
    return tl.interleave(even, odd) >= threshold - _HALF  # [BLOCK_M, BLOCK_K]
