"""The dropout mask of fastpeft.reference.dropout, drawn tile by tile in registers; nothing is stored.

Integers are unsigned and wrap. The two keys of a row are loop-invariant: the compiler lifts them out of column loops.
"""

import triton
import triton.language as tl


@triton.jit
def _row_keys(seed, m):
    """splitmix64 of row numbers ``m`` [BLOCK_M], as low and high 32-bit halves."""
    z = seed.to(tl.uint64) + (m + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    z = z ^ (z >> 31)
    return z.to(tl.uint32), (z >> 32).to(tl.uint32)


@triton.jit
def keep_tile(seed, threshold, m, first_k, BLOCK_K: tl.constexpr):
    """True where an element is kept: rows ``m`` [BLOCK_M], columns first_k ... first_k + BLOCK_K (first_k is even)."""
    lo, hi = _row_keys(seed, m)
    j = (first_k // 2 + tl.arange(0, BLOCK_K // 2)).to(tl.uint32)
    z = ((j * 0x9E3779B1)[None, :] ^ lo[:, None]) * 0x85EBCA6B  # [BLOCK_M, BLOCK_K / 2]
    z = ((z ^ (z >> 15)) + hi[:, None]) * 0xC2B2AE35
    z = z ^ (z >> 16)
    even = (z << 16).to(tl.int32, bitcast=True) >> 16  # sign-extended halves
    odd = z.to(tl.int32, bitcast=True) >> 16
    return tl.interleave(even, odd) >= threshold - 32768  # [BLOCK_M, BLOCK_K]


def threshold(dropout: float) -> int:
    """How many of the 65,536 values of a lane are dropped."""
    return min(round(dropout * 65536), 65535)
