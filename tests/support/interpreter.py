"""Triton's interpreter computes bfloat16 as GPUs do: operands widened exactly, results rounded to the nearest.

As it comes, it keeps bfloat16 as bit patterns, adds and multiplies these as integers, and truncates where it converts
from float32. ``correct()`` replaces the methods of its builder that are concerned; what it does not cover raises.
"""

import contextlib
import functools
from collections.abc import Iterator

import numpy as np


def widened(bits: np.ndarray) -> np.ndarray:
    """The float32 values of bfloat16 bit patterns, exactly."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def rounded(values: np.ndarray) -> np.ndarray:
    """Bit patterns of the nearest bfloat16, ties to even; past the largest it is infinite, a NaN stays one."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    nearest = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), (bits >> np.uint32(16)) | np.uint32(0x40), nearest).astype(np.uint16)


@contextlib.contextmanager
def rows_apart() -> Iterator[None]:
    """Products whose rows have the same bits at every place of a tile, as tensor cores give them.

    The interpreter multiplies by the library of numpy, which may add the rows at a tile's edge in another order.
    """
    matmul = np.matmul

    def by_rows(a, b, **settings):
        return np.stack([matmul(row, b, **settings) for row in a]) if a.ndim == 2 else matmul(a, b, **settings)

    np.matmul = by_rows  # type: ignore[assignment]
    try:
        yield
    finally:
        np.matmul = matmul  # type: ignore[assignment]


def correct() -> None:
    """Correct the interpreter, once, and tell fastpeft that it may be asked for bfloat16."""
    import triton.language as tl
    from triton._C.libtriton import ir
    from triton.runtime import interpreter

    from fastpeft import _backend

    if _backend.interprets_bfloat16:
        return
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle

    def narrow(t) -> bool:
        return isinstance(t, handle) and t.dtype.scalar == tl.bfloat16

    def wide(t):
        return handle(widened(t.data), tl.float32) if narrow(t) else t

    def converting(original):
        @functools.wraps(original)
        def convert(self, src, dst_type, *mode):
            if narrow(src) == (dst_type.scalar == tl.bfloat16):
                return original(self, src, dst_type, *mode)
            if narrow(src):
                return handle(widened(src.data).astype(interpreter._get_np_dtype(dst_type)), dst_type.scalar)
            if ir.ROUNDING_MODE.RTZ in mode:
                raise NotImplementedError("tests.support.interpreter: bfloat16 rounded towards zero")
            return handle(rounded(src.data.astype(np.float32)), tl.bfloat16)

        return convert

    def computing(original):
        @functools.wraps(original)
        def compute(self, *args):
            if not any(map(narrow, args)):
                return original(self, *args)
            result = original(self, *map(wide, args))
            return handle(rounded(result.data), tl.bfloat16) if result.data.dtype == np.float32 else result

        return compute

    def multiplying(original):
        @functools.wraps(original)
        def dot(self, a, b, d, *rest):
            if narrow(d):
                raise NotImplementedError("tests.support.interpreter: a product accumulated in bfloat16")
            return original(self, wide(a), wide(b), d, *rest)

        return dot

    def reducing(original):
        @functools.wraps(original)
        def apply(self, input):
            if any(narrow(t.handle) for t in (input if isinstance(input, tuple) else (input,))):
                raise NotImplementedError("tests.support.interpreter: a reduction of bfloat16")
            return original(self, input)

        return apply

    for name in ("cast_impl", "create_fp_to_fp"):
        setattr(builder, name, converting(getattr(builder, name)))
    for name in ("binary_op", "unary_op", "create_clampf", "create_fma", "create_idiv", "create_rsqrt", "create_erf"):
        if hasattr(builder, name):  # older versions lack some
            setattr(builder, name, computing(getattr(builder, name)))
    builder.create_dot = multiplying(builder.create_dot)
    builder.get_bf16 = lambda self, value: handle(rounded(np.array([value], dtype=np.float32)), tl.bfloat16)
    interpreter.ReduceScanOpInterface.apply = reducing(interpreter.ReduceScanOpInterface.apply)
    _backend.interprets_bfloat16 = True
