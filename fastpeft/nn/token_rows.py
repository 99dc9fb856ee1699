"""An embedding that trains the rows of chosen tokens, in place: work in a batch's tokens, not in the vocabulary."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .live_slice import LiveSlice, index_of
from .plain import is_plain


class _Lookup(torch.autograd.Function):
    """``weight[ids]``; the gradient of row j of ``trained`` is the sum over the places where ``ids == index[j]``."""

    @staticmethod
    def forward(ctx, ids, weight, trained, index):
        slots = torch.searchsorted(index, ids).clamp_(max=len(index) - 1)
        # Tokens that are not trained share the one slot past the end, which the sum leaves out.
        ctx.save_for_backward(torch.where(index[slots] == ids, slots, len(index)), trained)
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        slots, trained = ctx.saved_tensors
        count = trained.shape[0]
        sums = torch.ops.aten.embedding_dense_backward(dy.to(trained.dtype), slots, count + 1, count, False)
        return None, None, sums[:count], None


class TokenRows(LiveSlice):
    """``y = scale · weight[ids]`` with a gradient for the rows of chosen tokens alone; the scale is 1, or the base's.

    The weight is the base's own and stays live, so a layer tied to it sees what was trained; make an output layer a
    ``RowSparseLinear``, another embedding ``TokenRows``, with the same ``trained`` for its share of the gradient.

    Args:
        base_layer: ``nn.Embedding`` with a weight ``[V, D]``, without ``max_norm`` and ``scale_grad_by_freq``, or a
            subclass that multiplies the rows by its ``embed_scale`` (Gemma, BART).
        tokens: The ids whose rows are trained: distinct, in [0, V), and not the padding's.
        dtype: The trained rows' dtype; None is the weight's, or float32 where that is 16 bits wide.
        trained: The rows of an embedding that is tied to this one; None for ones of its own.

    Raises:
        TypeError: The base is no plain ``nn.Embedding``, or an id no integer.
        ValueError: An id is out of range, there twice, or the padding's.
    """

    def __init__(
        self,
        base_layer: Any,
        tokens: Sequence[int] | Tensor,
        dtype: torch.dtype | None = None,
        trained: nn.Parameter | None = None,
    ):
        reason = no_embedding_reason(base_layer)
        if reason is not None:
            raise TypeError(f"TokenRows: base_layer is {reason}, expected a plain nn.Embedding")
        index = index_of("TokenRows", "tokens", tokens, base_layer.num_embeddings)
        if base_layer.padding_idx in index.tolist():
            raise ValueError(f"TokenRows: tokens has {base_layer.padding_idx}, the padding, which gets no gradient")
        super().__init__(base_layer, index, dtype=dtype, trained=trained)
        self.scaled = type(base_layer).forward is not nn.Embedding.forward
        self.stored.requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        """``[..., D]``, as the base layer's.

        Args:
            ids: ``[...]`` integers in [0, V).
        """
        if is_plain(ids):
            y = F.embedding(ids, self.written())
            return y * _scale(self.__dict__["base_layer"]) if self.scaled else y
        weight, trained = self.current(), self.trained
        if not (trained.requires_grad and torch.is_grad_enabled()):
            y = F.embedding(ids, weight)
        else:
            y = _Lookup.apply(ids, weight, trained, self.index)
        return y * _scale(self.__dict__["base_layer"]) if self.scaled else y

    def extra_repr(self) -> str:
        rows, width = self.stored.shape
        return f"{rows}, {width}, tokens={len(self.index)}"


def no_embedding_reason(module: nn.Module) -> str | None:
    """None for an ``nn.Embedding`` whose lookup is no more than that, or scaled, else what it is instead."""
    if not isinstance(module, nn.Embedding) or not (type(module) is nn.Embedding or _only_scales(module)):
        return f"a {type(module).__name__}"
    if module.max_norm is not None or module.scale_grad_by_freq:
        return "an Embedding with max_norm or scale_grad_by_freq"
    return None if type(module.weight) is nn.Parameter else f"an Embedding with a {type(module.weight).__name__} weight"


def _only_scales(module: nn.Embedding) -> bool:
    """Whether a subclass looks its rows up and multiplies them by ``embed_scale``; two rows are looked up to see it."""
    if type(module).forward is nn.Embedding.forward:
        return True
    if not isinstance(getattr(module, "embed_scale", None), float | int | Tensor):
        return False
    ids = torch.arange(min(2, module.num_embeddings), device=module.weight.device)
    with torch.no_grad():
        return torch.equal(type(module).forward(module, ids), F.embedding(ids, module.weight) * _scale(module))


def _scale(module: Any) -> float | Tensor:
    scale = module.embed_scale
    return scale.to(module.weight.dtype) if isinstance(scale, Tensor) else scale
