"""A linear layer of whose weight only some rows or columns are trained, in plain PyTorch: the definition, and steps.

``row_linear`` is what the op means; autograd differentiates it. ``forward`` and ``backward`` are the steps that every
backend offers. Shapes: ``x [M, K]``, ``dY [M, N]``, ``index [n]``; the trained part is ``[n, K]`` for rows of the
weight and ``[N, n]`` for columns, in x's dtype or wider.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def row_linear(
    x: Tensor, weight: Tensor, trained: Tensor, index: Tensor, bias: Tensor | None = None, columns: bool = False
) -> Tensor:
    """``y = x Wᵀ + bias``, where W is ``weight`` with ``trained`` in the rows (or columns) ``index``.

    Args:
        x: the input ``[..., K]``.
        weight: ``[N, K]`` in x's dtype.
        trained: ``[n, K]``, or ``[N, n]`` for columns, in the weight's dtype or a wider one.
        index: ``[n]`` int64, the distinct numbers of the rows or columns.
        bias: ``[N]``, or None for none.
        columns: whether ``trained`` holds columns; else rows.

    Returns:
        ``[..., N]`` in x's dtype. Source: Yang et al., "S2FT: Efficient, Scalable and Generalizable LLM Fine-tuning by
        Structured Sparsity" (2024), which trains rows and columns by slices of the weight.
    """
    return F.linear(x, weight.index_copy(int(columns), index, trained.to(weight.dtype)), bias)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x Wᵀ + bias``: PyTorch's GEMM in every backend, since the live weight holds the trained part."""
    return F.linear(x, weight, bias)


def backward(dy: Tensor, x: Tensor, index: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The trained part's gradient in ``dtype``: ``dY[:, index]ᵀ x`` ``[n, K]`` for rows.

    Without an index ``dYᵀ x`` ``[N, n]``, for columns: x then holds the chosen ones alone.
    """
    chosen = dy if index is None else dy.index_select(1, index)
    return chosen.to(dtype).T @ x.to(dtype)
