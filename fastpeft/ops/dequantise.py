"""Quantised weights written out, bit for bit as the library does that made them.

    4 bits    W_i = code[c_i] · absmax[i // block]                  NF4 or FP4, by the code
    nested    absmax_j = code2[q_j] · absmax2[j // block2] + offset
    8 bits    W_nk = c_nk · (absmax_n / 127)

i counts the elements of W [N, K], row by row. All of it is float32, rounded after each operation, and once more to W's
dtype. Nothing is saved: to autograd W is a constant. Source: Dettmers et al., "QLoRA" (2023) and "LLM.int8()" (2022).
"""

import torch
from torch import Tensor

from .. import _backend, _check
from .._library import register_op
from .base import TABLES, Base, opaque


def _implementation(codes, absmax, code, absmax2, code2, offset, shape, block, block2, dtype, backend):
    out = torch.empty(shape, dtype=dtype, device=codes.device)
    _backend.load("dequantise", backend).write(out, codes, absmax, code, absmax2, code2, offset, block, block2)
    return [out]


def _fake(codes, absmax, code, absmax2, code2, offset, shape, block, block2, dtype, backend):
    return [codes.new_empty(shape, dtype=dtype)]


_dequantise = register_op(
    "dequantise",
    "(Tensor codes, Tensor absmax, Tensor code, Tensor absmax2, Tensor code2, Tensor offset, int[] shape, int block, "
    "int block2, ScalarType dtype, str backend) -> Tensor[]",
    _implementation,
    _fake,
)


def dequantise(base: Base, dtype: torch.dtype | None = None, backend: str | None = None) -> Tensor:
    """The weight ``[N, K]`` of a ``Base``: float32 products, rounded once to ``dtype``; a constant to autograd.

    Args:
        base: made by ``fastpeft.ops.four_bit``, ``fastpeft.ops.eight_bit`` or ``fastpeft.ops.written_by``.
        dtype: float16, bfloat16, float32 or float64; None is the base's, float32 without one.
        backend: "cuda", "triton" or "reference", which then serves the call, or raises with the reason why it cannot.
            None takes the environment's ``FASTPEFT_BACKEND``, and without one the first of the three that can serve.

    Returns:
        ``[N, K]``, contiguous.

    Raises:
        TypeError: ``base`` is no Base, or ``dtype`` no floating-point dtype.
        ValueError: the backend asked for cannot serve the call.
    """
    if not isinstance(base, Base):
        raise TypeError(f"dequantise: base is {_check.shown(base)}, expected a fastpeft.ops.Base")
    dtype = _check.dtype_or_none("dequantise", "dtype", dtype) or base.dtype or torch.float32
    if base.block2 < 0:
        return opaque(base.block2, base.shape, dtype)
    backend = _backend.choose("dequantise", backend, REASONS, base.codes, dtype)
    shape = [int(size) for size in base.shape]
    return _dequantise(*base[: 1 + TABLES], shape, base.block, base.block2, dtype, backend)[0]


def _triton_reason(codes: Tensor, dtype: torch.dtype) -> str | None:
    return _backend.triton_reason(codes.device) or _backend.bfloat16_reason(codes.device, dtype)


REASONS = {
    "cuda": lambda codes, dtype: _backend.cuda_missing() or "fastpeft._C has no dequantise",
    "triton": _triton_reason,
    "reference": lambda codes, dtype: None,
}


def facts(given: dict) -> tuple:
    """What ``REASONS`` look at, of the arguments of ``dequantise`` by name."""
    return given["base"].codes, given.get("dtype") or given["base"].dtype or torch.float32
