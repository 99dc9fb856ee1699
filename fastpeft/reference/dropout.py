"""Counter-based dropout: the mask is a pure function of (seed, row, column), so nobody has to store it.

Forward, backward, recomputation under gradient checkpointing and every backend draw the same bits from the same
64-bit seed. The definition, on unsigned integers that wrap::

    key(m)     = splitmix64(seed + (m + 1) * 0x9E3779B97F4A7C15)            64 bits for row m
    lo, hi     = key(m) mod 2**32, key(m) >> 32
    z          = ((j * 0x9E3779B1) ^ lo) * 0x85EBCA6B                       32 bits for the column pair j = k // 2
    z          = ((z ^ (z >> 15)) + hi) * 0xC2B2AE35
    word(m, j) = z ^ (z >> 16)
    keep(m, k) = (low half of word if k is even else high half), as int16, >= threshold - 2**15

with ``threshold = round(p * 2**16)``. One 32-bit draw serves two elements. The row key enters twice, so two rows never
share a run of draws. The probability is a multiple of 2**-16, and kept elements are divided by the probability that
was really used, so the expectation is exact.

Sources: Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (OOPSLA 2014) for the row key;
Appleby's MurmurHash3 finaliser for the constants of the word.
"""

import torch
from torch import Tensor

from .. import _host
from .._mask import (
    LANES,
    PAIR_FACTORS,
    PAIR_SHIFTS,
    PAIR_STEP,
    ROW_FACTORS,
    ROW_SHIFTS,
    ROW_STEP,
    inverse_keep,
    threshold,
)

__all__ = ["drawn_mask", "inverse_keep", "keep_mask", "row_keys", "threshold"]


def _shift_right(z: Tensor, bits: int, width: int, out: Tensor | None = None) -> Tensor:
    # PyTorch has no logical shift for signed integers, and no shift at all for unsigned ones on the CPU.
    return torch.bitwise_right_shift(z, bits, out=out).bitwise_and_((1 << (width - bits)) - 1)


def _signed(constant: int, width: int) -> int:
    return constant - (1 << width) if constant >> (width - 1) else constant


def row_keys(seed: Tensor, rows: int | Tensor) -> Tensor:
    """splitmix64 of the rows 0 ... rows - 1 for a seed of one int64 element, or of row ``rows[i]`` for ``seed[i]``."""
    if isinstance(rows, Tensor):
        z = rows + 1
    else:
        z, seed = torch.arange(1, rows + 1, dtype=torch.int64, device=seed.device), seed.reshape(())
    z = z.mul_(_signed(ROW_STEP, 64)).add_(seed)
    for factor, shift in zip(ROW_FACTORS, ROW_SHIFTS, strict=False):
        z = z.bitwise_xor_(_shift_right(z, shift, 64)).mul_(_signed(factor, 64))
    return z.bitwise_xor_(_shift_right(z, ROW_SHIFTS[-1], 64))


def keep_mask(
    seed: Tensor | None, dropout: float, rows: int | Tensor, columns: int, dtype: torch.dtype = torch.bool
) -> Tensor:
    """The dropout mask ``[rows, columns]``: one (or True) where the element is kept.

    Args:
        seed: int64, one element, on the device where the mask is wanted.
        dropout: probability of dropping an element, in [0, 1), rounded to 2**-16.
        rows: how many, numbered from 0; or their numbers, int64 ``[rows]``, with a seed each, ``[rows]``.
        columns: how many columns.
        dtype: any real dtype. A float mask costs no extra pass and multiplies faster than a bool one.

    Raises:
        ValueError: there is no seed.
    """
    if seed is None:
        raise ValueError("keep_mask: seed is None, expected one int64 element")
    pairs = (columns + 1) // 2
    keys = row_keys(seed, rows)
    rows = len(keys)
    lo, hi = keys.view(torch.int32).view(rows, 2, 1).unbind(1)  # little-endian halves
    j = torch.arange(pairs, dtype=torch.int32, device=seed.device).mul_(_signed(PAIR_STEP, 32))
    z = torch.bitwise_xor(j, lo).mul_(_signed(PAIR_FACTORS[0], 32))
    shifted = _shift_right(z, PAIR_SHIFTS[0], 32)
    z = z.bitwise_xor_(shifted).add_(hi).mul_(_signed(PAIR_FACTORS[1], 32))
    z = z.bitwise_xor_(_shift_right(z, PAIR_SHIFTS[1], 32, out=shifted))  # fresh memory would cost more than the shift
    lanes = z.view(torch.int16)[:, :columns]
    keep = torch.empty(rows, columns, dtype=dtype, device=seed.device)
    return torch.ge(lanes, threshold(dropout) - LANES // 2, out=keep)


def drawn_mask(seed: Tensor | None, dropout: float, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """``keep_mask`` of floating point, in one pass on a CPU where the host extension is there: the same bits."""
    if seed is None or seed.device.type != "cpu" or _host.load() is None:
        return keep_mask(seed, dropout, rows, columns, dtype)
    return torch.ops.fastpeft.keep_mask(seed, threshold(dropout), rows, columns, dtype)
