"""A linear layer of whose weight only some rows or columns are trained, in plain PyTorch: the definition, and steps.

``row_linear`` is what the op means; autograd differentiates it. The two steps below it are the gradients that every
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
        x: ``[..., K]``; weight: ``[N, K]``; trained: ``[n, K]``, or ``[N, n]`` for columns; index: ``[n]`` int64,
            distinct; bias: ``[N]``.

    Returns:
        ``[..., N]`` in x's dtype. Source: Yang et al., "S2FT: Efficient, Scalable and Generalizable LLM Fine-tuning by
        Structured Sparsity" (2024), which trains rows and columns by slices of the weight.
    """
    return F.linear(x, weight.index_copy(int(columns), index, trained.to(weight.dtype)), bias)


def row_gradient(dy: Tensor, x: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """``dY[:, index]ᵀ x``: ``[n, K]`` in ``dtype``."""
    return dy.index_select(1, index).to(dtype).T @ x.to(dtype)


def column_gradient(dy: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """``dYᵀ x`` of an x that holds the chosen columns alone: ``[N, n]`` in ``dtype``."""
    return dy.to(dtype).T @ x.to(dtype)
