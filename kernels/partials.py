"""The fixed-order sums of partial results: deterministic, unlike atomics. One launch sums, and rounds once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, run

BLOCK, PARTS = 512, 8  # elements of a program, and planes that it reads at a time


@triton.jit
def _plane_sum(p_ptr, i, parts, size, ACC: tl.constexpr, PARTS: tl.constexpr):
    """``Σ p[:, i]`` of ``[parts, size]``, eight planes at a time."""
    acc = tl.zeros(i.shape, ACC)
    for p0 in range(0, parts, PARTS):
        p = p0 + tl.arange(0, PARTS).to(tl.int64)
        tile = p_ptr + p[:, None] * size + i[None, :]
        acc += tl.sum(tl.load(tile, mask=(p < parts)[:, None] & (i < size)[None, :], other=0.0), 0)
    return acc


@triton.jit
def _sum_kernel(
    p_ptr, y_ptr, q_ptr, z_ptr,
    parts, size, columns, stride_y, blocks, q_parts, q_size,
    PAIR: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    i = pid * BLOCK + tl.arange(0, BLOCK)
    if PAIR:
        if pid >= blocks:
            j = (pid - blocks) * BLOCK + tl.arange(0, BLOCK)
            tl.store(z_ptr + j, _plane_sum(q_ptr, j, q_parts, q_size, ACC, PARTS), mask=j < q_size)
            return
    total = _plane_sum(p_ptr, i, parts, size, ACC, PARTS)
    tl.store(y_ptr + (i // columns) * stride_y + i % columns, total, mask=i < size)


def reduce_partials(partials: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over the first dimension, in ``dtype``."""
    if partials.shape[0] == 1:
        return partials[0].to(dtype)
    y = partials.new_empty(partials.shape[1:], dtype=dtype)
    sum_into(partials, y)
    return y


def sum_into(partials: Tensor, y: Tensor, others: Tensor | None = None, z: Tensor | None = None) -> None:
    """``y = Σ partials`` and, in the same launch, ``z = Σ others``.

    ``partials [P, ...]`` and ``others [Q, ...]`` are contiguous; y is, or has two dimensions of which the last is
    adjacent; z is contiguous.
    """
    size, columns = y.numel(), y.shape[-1]
    rows = y if y.dim() == 2 else y.view(-1, columns)
    blocks, more = cdiv(size, BLOCK), 0 if z is None else cdiv(z.numel(), BLOCK)
    if not blocks + more:
        return
    run(
        _sum_kernel, (blocks + more,),
        partials, rows, others, z, partials.shape[0], size, max(1, columns), rows.stride(0), blocks,
        0 if others is None else others.shape[0], 0 if z is None else z.numel(),
        PAIR=z is not None, ACC=tl.float64 if partials.dtype == torch.float64 else tl.float32, BLOCK=BLOCK, PARTS=PARTS,
    )  # fmt: skip
