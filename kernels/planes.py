"""Products with float32 matrices on the tensor cores of bfloat16.

A float32 number is the exact sum of three bfloat16 ones, its planes: 24 bits, eight in each. Beside an operand that is
bfloat16, and so exact as it is, three products of planes are the float32 product. Where both operands are float32 and
the result is rounded to bfloat16, the three largest products of two planes each err by 2**-13 of a term at most, a 16th
of that rounding, and where one of them is bfloat16 two planes of the other by 2**-15. Planes live in registers and
shared memory alone: nothing is stored, and no kernel more is launched.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Math, math

PLANES, PAIRS, HALVES = tl.constexpr("planes"), tl.constexpr("pairs"), tl.constexpr("halves")
SPLIT = {PLANES.value, PAIRS.value, HALVES.value}


@triton.jit
def _upper(a):
    """The upper half of float32's bits, as bfloat16 and as float32: rounding towards zero, by integer units alone."""
    bits = a.to(tl.int32, bitcast=True)
    return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True), (bits & -65536).to(tl.float32, bitcast=True)


@triton.jit
def split_planes(a):
    """High, middle and low: bfloat16, together exactly ``a``."""
    high, wide = _upper(a)
    rest = a - wide
    middle, wide = _upper(rest)
    low, _ = _upper(rest - wide)
    return high, middle, low


@triton.jit
def _halves(x, a, acc):
    """Two planes of whichever is float32."""
    if x.dtype == tl.float32:
        high, low, _ = split_planes(x)
        acc = tl.dot(high, a, tl.dot(low, a, acc, out_dtype=acc.dtype), out_dtype=acc.dtype)
    else:
        high, low, _ = split_planes(a)
        acc = tl.dot(x, high, tl.dot(x, low, acc, out_dtype=acc.dtype), out_dtype=acc.dtype)
    return acc


@triton.jit
def dot(x, a, acc, PRECISION: tl.constexpr):
    """``acc + x a``, the smallest terms first; x in the dtype of a, which is exact, where no planes are asked for."""
    if PRECISION == PLANES:
        high, middle, low = split_planes(a)
        acc = tl.dot(x, low, acc, out_dtype=acc.dtype)
        acc = tl.dot(x, middle, acc, out_dtype=acc.dtype)
        acc = tl.dot(x, high, acc, out_dtype=acc.dtype)
    elif PRECISION == PAIRS:
        x_high, x_low, _ = split_planes(x)
        high, low, _ = split_planes(a)
        acc = tl.dot(x_low, high, acc, out_dtype=acc.dtype)
        acc = tl.dot(x_high, low, acc, out_dtype=acc.dtype)
        acc = tl.dot(x_high, high, acc, out_dtype=acc.dtype)
    elif PRECISION == HALVES:
        acc = _halves(x, a, acc)
    else:
        acc = tl.dot(x.to(a.dtype), a, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    return acc


def products(x: Tensor, a: Tensor, out: torch.dtype) -> Math:
    """How x and a are multiplied where the result is rounded to ``out``; ``math`` for whatever is no float32 matrix."""
    found, narrow = math(x, a), torch.bfloat16
    if {x.dtype, a.dtype} == {torch.float32, narrow} and out == narrow:
        return found._replace(precision=HALVES.value)
    if a.dtype != torch.float32:
        return found
    if x.dtype == narrow:
        return found._replace(precision=PLANES.value)
    if x.dtype == torch.float32 and out.itemsize == 2:
        return found._replace(precision=PAIRS.value if out == narrow else "tf32x3")
    return found
