"""Quantised weights written out: one read of the codes and scales, one write of W [N, K].

    4 bits    W_i = code[c_i] · absmax[i // block]                  i counts the elements, two of which share a byte
    nested    absmax_j = code2[q_j] · absmax2[j // block2] + offset
    8 bits    W_nk = c_nk · (absmax_n / 127)

A program writes consecutive elements i, whole blocks of them or a part of one. Every operation is rounded by itself, so
that the bits are those of the library that wrote the codes: multiply-adds are not contracted. A part of W, some of its
rows or columns, is WIDTH elements in each of its rows, STRIDE apart; some rows of W are one such row.
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
    FIRST, STRIDE, WIDTH, TILES,
    NESTED: tl.constexpr, BLOCK: tl.constexpr, BLOCK2: tl.constexpr, BLOCKS: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    row, i = pid // TILES, pid % TILES * ELEMENTS + tl.arange(0, ELEMENTS)
    begin = FIRST + row * STRIDE
    first, end = begin + pid % TILES * ELEMENTS, begin + WIDTH
    b = first // 2 + tl.arange(0, ELEMENTS // 2)
    byte = tl.load(codes_ptr + b, mask=b < (end + 1) // 2, other=0)  # [ELEMENTS / 2]
    c = tl.interleave(byte >> 4, byte & 15)  # [ELEMENTS]
    j = first // BLOCK + tl.arange(0, BLOCKS)
    j_ok = j * BLOCK < end
    if NESTED:
        q = tl.load(absmax_ptr + j, mask=j_ok, other=0)  # [BLOCKS]
        scale = tl.load(code2_ptr + q.to(tl.int32)) * tl.load(absmax2_ptr + j // BLOCK2, mask=j_ok, other=0.0)
        scale = scale + tl.load(offset_ptr)
    else:
        scale = tl.load(absmax_ptr + j, mask=j_ok, other=0.0)
    value = tl.load(code_ptr + c.to(tl.int32))
    w = tl.reshape(tl.reshape(value, (BLOCKS, ELEMENTS // BLOCKS)) * scale[:, None], (ELEMENTS,))
    tl.store(out_ptr + row * WIDTH + i, w, mask=i < WIDTH)


@triton.jit
def _eight_bit_kernel(codes_ptr, absmax_ptr, out_ptr, FIRST, STRIDE, WIDTH, TILES, K, ELEMENTS: tl.constexpr):
    pid = tl.program_id(0).to(tl.int64)
    row, i = pid // TILES, pid % TILES * ELEMENTS + tl.arange(0, ELEMENTS)
    element = FIRST + row * STRIDE + i
    c = tl.load(codes_ptr + element, mask=i < WIDTH, other=0)  # [ELEMENTS]
    scale = tl.load(absmax_ptr + element // K, mask=i < WIDTH, other=0.0) * _INVERSE
    tl.store(out_ptr + row * WIDTH + i, c.to(tl.float32) * scale, mask=i < WIDTH)


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
    first: int = 0,
    columns: int | None = None,
) -> None:
    """W into ``out`` ``[N, K]``, which is contiguous; what is absent is an empty tensor.

    Or a part of W, which has so many ``columns``, from element ``first`` on. In 4 bits each of the part's rows begins
    with a block.
    """
    (rows, width), c = out.shape, config(out.dtype, capability(out))
    k = width if columns is None else columns
    if k == width:
        rows, width = 1, rows * width
    tiles = cdiv(width, c.elements)
    grid, options = (rows * tiles,), {"num_warps": c.num_warps, "enable_fp_fusion": False}
    if not out.numel():
        return
    part = first, k, width, tiles
    if not code.numel():
        run(_eight_bit_kernel, grid, codes, absmax, out, *part, k, ELEMENTS=c.elements, **options)
        return
    run(
        _four_bit_kernel, grid, codes, absmax, code, absmax2, code2, offset, out, *part,
        NESTED=absmax2.numel() > 0, BLOCK=block, BLOCK2=block2,
        BLOCKS=max(1, c.elements // block), ELEMENTS=c.elements, **options,
    )  # fmt: skip


def describe(out: Tensor, *_) -> list[str]:
    """The kernel configuration of a call, for ``fastpeft.explain``."""
    return [f"write: {config(out.dtype, capability(out))}"]
