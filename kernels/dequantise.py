"""Quantised weights written out: one read of the codes and scales, one write of W [N, K].

    4 bits    W_i = code[c_i] · absmax[i // block]                  i counts the elements, two of which share a byte
    nested    absmax_j = code2[q_j] · absmax2[j // block2] + offset
    8 bits    W_nk = c_nk · (absmax_n / 127)

A program writes consecutive elements i, whole blocks of them or a part of one. Every operation is rounded by itself, so
that the bits are those of the library that wrote the codes: multiply-adds are not contracted.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import capability, cdiv, run

_INVERSE = tl.constexpr(1.0 / 127.0)


@dataclass(frozen=True)
class Config:
    """How many elements a program writes, and by how many warps."""

    elements: int
    num_warps: int


def config(dtype: torch.dtype, capability: int) -> Config:
    """16 elements a thread: 8 bytes of codes are one load, 16 bytes of W one store. Not yet measured."""
    return Config(2048, 4)


@triton.jit
def _four_bit_kernel(
    codes_ptr, absmax_ptr, code_ptr, absmax2_ptr, code2_ptr, offset_ptr, out_ptr,
    TOTAL,
    NESTED: tl.constexpr, BLOCK: tl.constexpr, BLOCK2: tl.constexpr, BLOCKS: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    first = pid * ELEMENTS
    b = first // 2 + tl.arange(0, ELEMENTS // 2)
    byte = tl.load(codes_ptr + b, mask=b < (TOTAL + 1) // 2, other=0)  # [ELEMENTS / 2]
    c = tl.interleave(byte >> 4, byte & 15)  # [ELEMENTS]
    j = first // BLOCK + tl.arange(0, BLOCKS)
    j_ok = j * BLOCK < TOTAL
    if NESTED:
        q = tl.load(absmax_ptr + j, mask=j_ok, other=0)  # [BLOCKS]
        scale = tl.load(code2_ptr + q.to(tl.int32)) * tl.load(absmax2_ptr + j // BLOCK2, mask=j_ok, other=0.0)
        scale = scale + tl.load(offset_ptr)
    else:
        scale = tl.load(absmax_ptr + j, mask=j_ok, other=0.0)
    value = tl.load(code_ptr + c.to(tl.int32))
    w = tl.reshape(tl.reshape(value, (BLOCKS, ELEMENTS // BLOCKS)) * scale[:, None], (ELEMENTS,))
    i = first + tl.arange(0, ELEMENTS)
    tl.store(out_ptr + i, w, mask=i < TOTAL)


@triton.jit
def _eight_bit_kernel(codes_ptr, absmax_ptr, out_ptr, TOTAL, K, ELEMENTS: tl.constexpr):
    pid = tl.program_id(0).to(tl.int64)
    i = pid * ELEMENTS + tl.arange(0, ELEMENTS)
    c = tl.load(codes_ptr + i, mask=i < TOTAL, other=0)  # [ELEMENTS]
    scale = tl.load(absmax_ptr + i // K, mask=i < TOTAL, other=0.0) * _INVERSE
    tl.store(out_ptr + i, c.to(tl.float32) * scale, mask=i < TOTAL)


def write(
    out: Tensor,
    codes: Tensor,
    absmax: Tensor,
    code: Tensor,
    absmax2: Tensor,
    code2: Tensor,
    offset: Tensor,
    block: int,
    block2: int,
) -> None:
    """W into ``out`` ``[N, K]``, which is contiguous; what is absent is an empty tensor."""
    total, c = out.numel(), config(out.dtype, capability(out))
    grid, options = (cdiv(total, c.elements),), {"num_warps": c.num_warps, "enable_fp_fusion": False}
    if not total:
        return
    if not code.numel():
        run(_eight_bit_kernel, grid, codes, absmax, out, total, out.shape[1], ELEMENTS=c.elements, **options)
        return
    run(
        _four_bit_kernel, grid, codes, absmax, code, absmax2, code2, offset, out, total,
        NESTED=absmax2.numel() > 0, BLOCK=block, BLOCK2=block2,
        BLOCKS=max(1, c.elements // block), ELEMENTS=c.elements, **options,
    )  # fmt: skip


def describe(out: Tensor, *_) -> list[str]:
    """The kernel configuration of a call, for ``fastpeft.explain``."""
    return [f"write: {config(out.dtype, capability(out))}"]
