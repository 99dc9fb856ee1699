"""DoRA around a frozen linear layer, in plain PyTorch: the definition, and the steps that every backend offers.

``dora_linear`` is what the op means; autograd differentiates it. Its products are the steps of ``lora_linear``; what
lies between them is here: ``y``, ``u`` and ``dy`` are ``[M, N]``, ``x``, ``q`` and ``dx`` ``[M, K]``, the gain
``[N]``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._mask import inverse_keep, threshold
from .dropout import drawn_mask, keep_mask


def dora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor,
    bias: Tensor | None = None,
    scale: float = 1.0,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    norm: Tensor | None = None,
) -> Tensor:
    """``y = x Wᵀ + bias + (g - 1) ∘ (drop(x) Wᵀ) + g ∘ scale · (drop(x) Aᵀ) Bᵀ`` (Liu et al., "DoRA", 2024).

    ``g = magnitude / ‖W + scale · B A‖``, the norm of each row, which is a constant to every gradient (section 4.3).
    Without dropout y is ``g ∘ (x (W + scale · B A)ᵀ) + bias``.

    Args:
        x: the input ``[..., K]``.
        weight: W ``[N, K]`` in x's dtype.
        lora_a: A ``[r, K]``, in x's dtype or a wider one, in which all but the base products is computed.
        lora_b: B ``[N, r]`` in lora_a's dtype.
        magnitude: ``[N]``, the norms that the rows are given.
        bias: ``[N]``, or None for none.
        scale: factor of B A, without a unit.
        dropout: probability of dropping an element of x wherever the adapter acts, in [0, 1).
        seed: of the dropout mask, one int64 element on x's device. It is read where dropout is above 0.
        norm: ``[N]``, the rows' norms where they are known.

    Returns:
        ``[..., N]`` in x's dtype.
    """
    wide = lora_a.dtype
    if norm is None:
        norm = torch.linalg.vector_norm(weight.to(wide) + scale * (lora_b @ lora_a), dim=1)
    gain = magnitude.to(wide) / norm.detach()
    dropped = x
    if threshold(dropout):
        mask = keep_mask(seed, dropout, x[..., 0].numel(), x.shape[-1], x.dtype)
        dropped = x * mask.view(x.shape) * inverse_keep(dropout)
    y = F.linear(x, weight) + (gain - 1) * F.linear(dropped, weight)
    y = y + gain * (scale * (dropped.to(wide) @ lora_a.T) @ lora_b.T)
    if bias is not None:
        y = y + bias
    return y.to(x.dtype)


def masked(x: Tensor, dropout: float, seeds: Tensor) -> Tensor:
    """``mask ∘ x``, without the factor ``1 / (1 - p)``: every bit of what is kept is x's."""
    return drawn_mask(seeds[0], dropout, x.shape[0], x.shape[1], x.dtype).mul_(x)


def add_masked_(dx: Tensor, q: Tensor, dropout: float, seeds: Tensor, first: int = 0) -> None:
    """``dx += mask ∘ q``; these may be some columns, of which ``first``, an even number, is the first."""
    mask = drawn_mask(seeds[0], dropout, q.shape[0], first + q.shape[1], q.dtype)
    dx.addcmul_(q, mask[:, first:])


def combined(s: Tensor, c: Tensor, bias: Tensor | None, u: Tensor, factor: Tensor, y: Tensor | None = None) -> Tensor:
    """``S Cᵀ + bias + factor ∘ u + y`` in u's dtype, a factor for each column."""
    total = s @ c.T if bias is None else torch.addmm(bias.to(s.dtype), s, c.T)
    total.addcmul_(u, factor)
    return (total if y is None else total.add_(y)).to(u.dtype)


def scaled(dy: Tensor, factor: Tensor) -> Tensor:
    """``factor ∘ dy``, in dy's dtype."""
    return (dy * factor).to(dy.dtype)


def gain_gradient(dy: Tensor, u: Tensor, dtype: torch.dtype) -> Tensor:
    """``Σ dy ∘ u`` over the rows, in ``dtype``."""
    return (dy.to(dtype) * u).sum(0)
