"""A linear layer that trains chosen rows or columns of its weight, in place. Its forward is one call into ops.

Source: Yang et al., "S2FT: Efficient, Scalable and Generalizable LLM Fine-tuning by Structured Sparsity" (2024).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .base_layer import is_conv1d, not_linear_reason
from .live_slice import LiveSlice, index_of
from .plain import is_plain


class RowSparseLinear(LiveSlice):
    """``y = x Wᵀ + bias`` with the live weight; backward computes the gradient of the chosen rows or columns alone.

    >>> layer = RowSparseLinear(nn.Linear(512, 2048), rows=range(100))
    >>> optimizer = torch.optim.AdamW([layer.trained])        # [100, 512]; so is its state

    ``layer.weight`` and the state dict hold what has been trained; both are those of the base layer. The base's other
    rows, and its bias unless it asks for a gradient, stay as they are.

    Args:
        base_layer: ``nn.Linear`` or transformers' ``Conv1D``; its parameters become this layer's.
        rows: The numbers of the output features to train, distinct, in [0, N), from the end where negative. Either
            these or ``columns`` are given.
        columns: The numbers of the input features to train, distinct, in [0, K).
        dtype: The trained part's dtype; None is the weight's, or float32 where that is 16 bits wide.
        trained: The slice ``[n, K]`` (``[N, n]`` of columns) of a layer that is tied to this one; None for one of its
            own.

    Raises:
        TypeError: The base is no linear layer with a floating-point weight, or a number no integer.
        ValueError: Both or neither of ``rows`` and ``columns`` are given, or a number is out of range or there twice.
    """

    def __init__(
        self,
        base_layer: Any,
        rows: Sequence[int] | Tensor | None = None,
        columns: Sequence[int] | Tensor | None = None,
        dtype: torch.dtype | None = None,
        trained: nn.Parameter | None = None,
    ):
        reason = not_linear_reason(base_layer)
        if reason is not None:
            raise TypeError(f"RowSparseLinear: base_layer is {reason}, expected nn.Linear or Conv1D")
        if (rows is None) == (columns is None):
            raise ValueError("RowSparseLinear: expected either rows or columns")
        conv1d = is_conv1d(base_layer)
        sizes = base_layer.weight.shape[::-1] if conv1d else base_layer.weight.shape
        name, numbers, size = ("rows", rows, sizes[0]) if columns is None else ("columns", columns, sizes[1])
        index = index_of("RowSparseLinear", name, numbers, size)
        super().__init__(base_layer, index, columns is not None, conv1d, trained, dtype)
        self.stored.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., N]``, as the base layer's.

        Args:
            x: ``[..., K]``.
        """
        bias = self._parameters["bias"]
        if is_plain(x):
            return F.linear(x, self.written(), bias)
        return ops.row_linear(x, self.current(), self.trained, self.index, bias, self.columns)

    def extra_repr(self) -> str:
        n, k = self._matrix(self.stored).shape
        what = "columns" if self.columns else "rows"
        return f"in_features={k}, out_features={n}, {what}={len(self.index)}"
