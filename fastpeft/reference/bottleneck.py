"""A bottleneck adapter in plain PyTorch: the definition, and the steps that every backend offers.

``bottleneck`` is what the op means; autograd differentiates it. ``forward`` and ``backward`` are the same algebra with
the gradients written out (in bottleneck_backward.py); on the CPU they are also what runs. Shapes: ``x [M, K]``,
``down [H, K]``, ``up [N, H]``, the residual and y ``[M, N]``. The weights may have a wider dtype than x; the branch has
theirs.

A learned scale is folded into the up projection, ``scale · (h Uᵀ + b) = h (scale · U)ᵀ + scale · b``, and nothing of
y's size is kept for its gradient.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .._mask import inverse_keep
from . import bottleneck_backward
from .bottleneck_terms import ACTIVATIONS, Settings, Weights, mask_of, normalised, product, scaled_up
from .routing import Routing


def bottleneck(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    residual: Tensor | None = None,
    activation: str = "relu",
    scale: float | Tensor = 1.0,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm: str = "layer",
    eps: float = 1e-5,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    slots: Tensor | None = None,
) -> Tensor:
    """``residual + drop(scale · (act(norm(x) Dᵀ + d) Uᵀ + b))`` (Houlsby et al., 2019), without residual: plus 0.

    Args:
        x: the input ``[..., K]``.
        down_weight: D ``[H, K]``; all weights have x's dtype or a wider one, in which the branch is computed.
        down_bias: d ``[H]``, or None.
        up_weight: U ``[N, H]``.
        up_bias: b ``[N]``, or None.
        residual: ``[..., N]``, or None for 0; it gives y its dtype.
        activation: one of "relu", "gelu", "gelu_tanh", "silu", "tanh", "leaky_relu" and "identity".
        scale: a number, or a tensor ``[1]`` or ``[N]``.
        norm_weight: ``[K]``, or None for no norm.
        norm_bias: ``[K]``, or None.
        norm: "layer" or "rms", applied where there is a norm_weight.
        eps: added to the variance or the mean square.
        dropout: probability of dropping an element of the branch, in [0, 1).
        seed: of the mask: one int64 element, or ``[S]``, one for each slot. It is read where dropout is above 0.
        slots: the rows' adapters, of x's leading shape, -1 for none: the weights (and a scale that is a tensor) then
            have a leading dimension. The dropout mask's rows count the slot's own rows.

    Returns:
        ``[..., N]`` in the residual's dtype, or x's.
    """
    z, y = x.reshape(-1, x.shape[-1]), x.new_zeros(x[..., 0].numel(), up_weight.shape[-2])
    y = y if residual is None else residual.reshape(y.shape)
    tensor = scale if isinstance(scale, Tensor) else None
    weights = Weights(down_weight, down_bias, up_weight, up_bias, tensor, norm_weight, norm_bias)
    settings = Settings(activation, 1.0 if isinstance(scale, Tensor) else scale, norm, eps, dropout, False)
    if slots is None:
        out = (y + _branch(z, weights, settings, seed)).to(y.dtype)
        return out.view(*x.shape[:-1], out.shape[1])
    for slot in range(down_weight.shape[0]):
        rows = (slots.reshape(-1) == slot).nonzero()[:, 0]
        own_seed = seed if seed is None or seed.numel() == 1 else seed[slot]
        branch = _branch(z[rows], weights.of(slot), settings, own_seed)
        y = y.index_copy(0, rows, (y[rows] + branch).to(y.dtype))
    return y.view(*x.shape[:-1], y.shape[1])


def _branch(x: Tensor, weights: Weights, settings: Settings, seed: Tensor | None) -> Tensor:
    a = x.to(weights.down.dtype)
    if weights.norm_weight is not None:
        a = _normalise(a, weights, settings)
    h = ACTIVATIONS[settings.activation](F.linear(a, weights.down, weights.down_bias))
    u = F.linear(h, weights.up, weights.up_bias) * settings.scale
    u = u if weights.scale is None else u * weights.scale
    mask = mask_of(u, u.shape[0], u.shape[1], settings, seed)
    return u if mask is None else u * mask * inverse_keep(settings.dropout)


def _normalise(x: Tensor, weights: Weights, settings: Settings) -> Tensor:
    norm_weight, norm_bias = weights.norm_weight, weights.norm_bias
    if settings.norm == "layer":
        return F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, settings.eps)
    y = F.rms_norm(x, x.shape[-1:], norm_weight, settings.eps)
    return y if norm_bias is None else y + norm_bias


def forward(
    x: Tensor,
    weights: Weights,
    residual: Tensor | None,
    settings: Settings,
    seed: Tensor | None,
    routing: Routing | None,
) -> tuple[Tensor, Tensor]:
    """y, and what ``backward`` wants: z, the hidden values before the activation.

    With a routing each slot's rows have their own weights; a row without an adapter is its residual, or 0.
    """
    if routing is None:
        return _forward(x, weights, residual, settings, seed)
    return _grouped_forward(x, weights, residual, settings, seed, routing)


def backward(
    dy: Tensor,
    x: Tensor,
    kept: Tensor,
    weights: Weights,
    settings: Settings,
    seed: Tensor | None,
    routing: Routing | None,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """dx and the gradient of every one of the ``weights``; None where ``needs``, in this order, does not ask for it.

    ``kept`` is what ``forward`` kept. Where ``needs_x`` says so, x serves for its dtype alone. The gradients of slots
    without rows are 0.
    """
    if routing is None:
        return bottleneck_backward.run(dy, x, kept, weights, settings, seed, needs)
    return _grouped_backward(dy, x, kept, weights, settings, seed, routing, needs)


def _forward(
    x: Tensor, weights: Weights, residual: Tensor | None, settings: Settings, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    a = x.to(weights.down.dtype)
    if weights.norm_weight is not None:
        a, _ = normalised(a, weights, settings)
    z = _affine(weights.down_bias, a, weights.down.T, 1.0)
    h = ACTIVATIONS[settings.activation](z)
    up, up_bias = scaled_up(weights)
    u = _affine(up_bias, h, up.T, settings.scale * inverse_keep(settings.dropout))
    mask = mask_of(u, u.shape[0], u.shape[1], settings, seed)
    u = u if mask is None else u.mul_(mask)
    residual = x if settings.own else residual
    if residual is None:
        return u.to(x.dtype), z
    # Not the product on top of the residual: one pass less, but rounded twice at the residual's magnitude.
    y = u.add_(residual) if u.dtype == residual.dtype else (residual + u).to(residual.dtype)
    return y, z


def _affine(bias: Tensor | None, left: Tensor, right: Tensor, factor: float) -> Tensor:
    """``factor · (left right + bias)``."""
    return product(left, right, factor) if bias is None else torch.addmm(bias, left, right, beta=factor, alpha=factor)


def _grouped_forward(
    x: Tensor,
    weights: Weights,
    residual: Tensor | None,
    settings: Settings,
    seeds: Tensor | None,
    routing: Routing,
) -> tuple[Tensor, Tensor]:
    residual = x if settings.own else residual
    y = (
        x.new_zeros(len(x), weights.up.shape[1])
        if residual is None
        else residual.clone(memory_format=torch.contiguous_format)
    )
    kept = empty_kept(x, weights, settings)
    settings = settings._replace(own=False)
    for slot, rows, place in _rows(routing):
        part = None if residual is None else residual[rows]
        y[rows], kept[place : place + len(rows)] = _forward(
            x[rows], weights.of(slot), part, settings, _seed(seeds, slot)
        )
    return y, kept


def _grouped_backward(
    dy: Tensor,
    x: Tensor,
    kept: Tensor,
    weights: Weights,
    settings: Settings,
    seeds: Tensor | None,
    routing: Routing,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    dx = None
    if needs[0]:
        width = weights.down.shape[2]
        dx = dy.to(x.dtype, copy=True) if settings.own else dy.new_zeros(len(dy), width, dtype=x.dtype)
    grads = [
        torch.zeros_like(t, memory_format=torch.contiguous_format) if need and t is not None else None
        for t, need in zip(weights, needs[1:], strict=True)
    ]
    for slot, rows, place in _rows(routing):
        of_slot = weights.of(slot), settings, _seed(seeds, slot), needs
        kept_s = kept[place : place + len(rows)]
        dx_s, *found = bottleneck_backward.run(dy[rows], x[rows] if len(x) else x, kept_s, *of_slot)
        if dx is not None and dx_s is not None:
            dx[rows] = dx_s
        for grad, part in zip(grads, found, strict=True):
            if grad is not None and part is not None:
                grad[slot] = part
    return dx, *grads


def empty_kept(x: Tensor, weights: Weights, settings: Settings) -> Tensor:
    """Memory for what ``forward`` keeps, z ``[M, H]``."""
    down = weights.down
    return x.new_empty(x.shape[0], down.shape[-2], dtype=down.dtype)


def needs_x(needs: Sequence[bool], norm: bool) -> bool:
    """Whether ``backward`` reads x."""
    need_x, need_down, *_, need_norm, need_norm_bias = needs
    return need_down or need_norm or need_norm_bias or (norm and need_x)


def _rows(routing: Routing) -> Iterator[tuple[int, Tensor, int]]:
    """(slot, its rows, the place of the first in the order) of every slot that has rows."""
    starts = routing.starts.tolist()
    order = routing.order.long()
    for slot in range(routing.slots):
        if starts[slot] < starts[slot + 1]:
            yield slot, order[starts[slot] : starts[slot + 1]], starts[slot]


def _seed(seeds: Tensor | None, slot: int) -> Tensor | None:
    return seeds if seeds is None or seeds.numel() == 1 else seeds[slot]
