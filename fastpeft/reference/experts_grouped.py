"""Products of rows sorted by group, one matrix a group: PyTorch's ``grouped_mm``, or a loop where it does not serve."""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_GROUPED_MM: Any = getattr(F, "grouped_mm", None)  # PyTorch has it since 2.10
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def grouped_matmul(x: Tensor, weight: Tensor, starts: Tensor) -> Tensor:
    """``y[m] = x[m] weight[g]`` for the rows m of group g, ``starts[g]`` ... ``starts[g + 1] - 1``: ``[M, N]``.

    ``x [M, K]`` and ``weight [G, K, N]`` have one dtype, ``starts`` is ``int32 [G + 1]``. Rows from ``starts[G]`` on
    hold anything.
    """
    y_shape = len(x), weight.shape[2]
    if 0 in (*x.shape, *weight.shape):
        return x.new_zeros(y_shape)
    x, weight = _dense(x), _dense(weight)
    if _served(x, weight):
        return _GROUPED_MM(x, weight, offs=starts[1:]).contiguous()  # it pads short rows
    y = x.new_empty(y_shape)
    for g, rows in _groups(starts):
        torch.mm(x[rows], weight[g], out=y[rows])
    return y


def grouped_outer(s: Tensor, x: Tensor, starts: Tensor) -> Tensor:
    """``G[g] = Σ s[m]ᵀ x[m]`` over the rows m of group g: ``[G, R, K]`` for ``s [M, R]`` and ``x [M, K]``."""
    g_shape = len(starts) - 1, s.shape[1], x.shape[1]
    if 0 in (*s.shape, *x.shape):
        return x.new_zeros(g_shape)
    s, x = _dense(s), _dense(x)
    if _served(s.mT, x):
        return _GROUPED_MM(s.mT, x, offs=starts[1:])
    products = x.new_zeros(g_shape)
    for g, rows in _groups(starts):
        torch.mm(s[rows].mT, x[rows], out=products[g])
    return products


def add_grouped_(y: Tensor, x: Tensor, weight: Tensor, starts: Tensor) -> None:
    """``y += grouped_matmul(x, weight, starts)``, for y of the same dtype; on a CPU nothing is written in between."""
    if y.device.type != "cpu" or 0 in (*x.shape, *weight.shape):
        y.add_(grouped_matmul(x, weight, starts))
        return
    weight = _dense(weight)
    for g, rows in _groups(starts):
        y[rows].addmm_(x[rows], weight[g])


def grouped_sum(x: Tensor, starts: Tensor) -> Tensor:
    """``Σ x[m]`` over the rows m of each group, pairwise: ``[G, N]``."""
    sums = x.new_zeros(len(starts) - 1, x.shape[1])
    for g, rows in _groups(starts):
        torch.sum(x[rows], 0, out=sums[g])
    return sums


def laid_out_as(grad: Tensor, parameter: Tensor) -> Tensor:
    """``grad [G, N, R]`` with the groups adjacent if they are in ``parameter``, else contiguous."""
    if parameter.is_contiguous() or not parameter.permute(1, 2, 0).is_contiguous():
        return grad.contiguous()
    return grad.contiguous().view(len(grad), -1).T.contiguous().view(*grad.shape[1:], -1).permute(2, 0, 1)


def _groups(starts: Tensor) -> Iterator[tuple[int, slice]]:
    for g, (start, stop) in enumerate(itertools.pairwise(starts.tolist())):
        if start < stop:
            yield g, slice(start, stop)


def _dense(t: Tensor) -> Tensor:
    """The matrices with their rows or their columns adjacent; a copy where neither are."""
    steps = t.stride()[-2:]
    if (steps[1] == 1 and steps[0] >= t.shape[-1]) or (steps[0] == 1 and steps[1] >= t.shape[-2]):
        return t
    for view in (t, t.mT):  # LoRA's B as PEFT stores it has the groups adjacent: one transposition of a matrix
        if t.dim() == 3 and view.permute(1, 2, 0).is_contiguous():
            copy = view.permute(1, 2, 0).view(-1, len(t)).T.contiguous().view(view.shape)
            return copy if view is t else copy.mT
    return t.contiguous()


def _served(*operands: Tensor) -> bool:
    return _GROUPED_MM is not None and all(map(_aligned, operands))


def _aligned(t: Tensor) -> bool:
    """What ``grouped_mm`` asks for: one of three dtypes, and every row 16 bytes from the next or a multiple."""
    bits = max(t.stride()[-2:]) * t.itemsize | t.data_ptr()
    return t.dtype in _DTYPES and bits % 16 == 0
