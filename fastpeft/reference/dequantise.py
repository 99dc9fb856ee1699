"""Quantised weights written out, in plain PyTorch: the definition, and what runs on a CPU without the host extension.

    4 bits    W_i = code[c_i] · absmax[i // block]                  i counts the elements of W [N, K], row by row
    nested    absmax_j = code2[q_j] · absmax2[j // block2] + offset
    8 bits    W_nk = c_nk · (absmax_n / 127)

Two elements share a byte, the first in its high half. All of it is float32, rounded after each operation, and W is
rounded once more, to the dtype it is written in. Source: Dettmers et al., "QLoRA" (2023) and "LLM.int8()" (2022).
"""

from typing import Any

import torch
from torch import Tensor

from .. import _host

_STEP = 1 << 18  # elements whose values in float32 fit a core's cache


def dequantise(
    codes: Tensor,
    absmax: Tensor,
    code: Tensor,
    absmax2: Tensor,
    code2: Tensor,
    offset: Tensor,
    shape: tuple[int, int],
    block: int,
    block2: int,
    dtype: torch.dtype,
) -> Tensor:
    """The weight ``[N, K]`` in ``dtype``, as the head of this file says; what is absent is an empty tensor.

    Args:
        codes: two 4-bit numbers a byte, uint8 ``[N·K / 2]``, rounded up; or int8 ``[N, K]``.
        absmax: float32, one for each block, uint8 where nested; for int8 one for each row.
        code: the values of the 16 codes, float32; absent for int8.
        absmax2: float32, one for each ``block2`` of ``absmax``; absent where it is not nested.
        code2: the values of the 256 codes in ``absmax``, float32; absent where it is not nested.
        offset: one float32; absent where it is not nested.
        shape: N and K.
        block: elements of W that share a scale.
        block2: scales that share a scale.
        dtype: of the result.
    """
    out = torch.empty(shape, dtype=dtype, device=codes.device)
    define(out, codes, absmax, code, absmax2, code2, offset, block, block2)
    return out


def define(
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
    """``dequantise`` into ``out``, which is contiguous, by PyTorch's operators.

    Or a part of W, which has so many ``columns``, from element ``first`` on. In 4 bits each of the part's rows begins
    with a block.
    """
    (n, k), columns = out.shape, out.shape[1] if columns is None else columns
    row, column = divmod(first, max(1, columns))
    rows = slice(row, row + n)
    if not code.numel():
        torch.mul(codes[rows, column : column + k], (absmax[rows] * (1.0 / 127.0))[:, None], out=out)
        return
    if absmax2.numel():
        absmax = code2.index_select(0, absmax.int()) * absmax2.repeat_interleave(block2)[: absmax.numel()] + offset
    if k == columns:
        codes, absmax = codes[first // 2 :], absmax[first // block :]
    else:
        codes, absmax = (
            t.view(-1, columns // size)[rows, column // size : -(-(column + k) // size)].reshape(-1)
            for t, size in ((codes, 2), (absmax, block))
        )
    # Both values of a byte are found by one look-up, of eight bytes.
    pairs = torch.stack((code.repeat_interleave(16), code.repeat(16)), 1).view(torch.int64).view(-1)
    flat = out.view(-1)
    whole, step = flat.numel() // block * block, max(block, _STEP)
    for first in range(0, whole, step):
        end = min(first + step, whole)
        values = _values(pairs, codes, first, end).view(-1, block)
        flat[first:end].view(-1, block).copy_(values.mul_(absmax[first // block : end // block, None]))
    if whole < flat.numel():
        flat[whole:].copy_(_values(pairs, codes, whole, flat.numel()).mul_(absmax[-1]))


def _values(pairs: Tensor, codes: Tensor, first: int, end: int) -> Tensor:
    """The codes' values from an element that begins a byte to another."""
    return pairs.index_select(0, codes[first // 2 : (end + 1) // 2].int()).view(torch.float32)[: end - first]


def write(out: Tensor, *base: Any) -> None:
    """``define``, in one pass on a CPU where the host extension is there: the same bits.

    Args:
        out: ``[N, K]``, contiguous.
        base: as ``define`` takes them.
    """
    if out.device.type == "cpu" and _host.load() is not None:
        torch.ops.fastpeft.dequantise_(out, *base)
    else:
        define(out, *base)


def scratch(count: int, dtype: torch.dtype) -> Tensor | None:
    """Memory of a CPU that the host extension gives again once this is let go; None where it is not there."""
    return None if _host.load() is None else torch.ops.fastpeft.scratch(count, dtype)
