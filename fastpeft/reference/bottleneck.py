"""A bottleneck adapter in plain PyTorch: the definition, and the steps that every backend offers.

``bottleneck`` is what the op means; autograd differentiates it. ``forward`` and ``backward`` below it are the same
algebra with the gradients written out; on the CPU they are also what runs. Shapes: ``x [M, K]``, ``down [H, K]``,
``up [N, H]``, the residual and y ``[M, N]``. The weights may have a wider dtype than x; the branch has theirs.

A learned scale is folded into the up projection, ``scale · (h Uᵀ + b) = h (scale · U)ᵀ + scale · b``, and nothing of
y's size is kept for its gradient.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .dropout import inverse_keep, keep_mask, threshold
from .routing import Routing

LEAKY_SLOPE = 0.01
ACTIVATIONS = {
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "leaky_relu": lambda z: F.leaky_relu(z, LEAKY_SLOPE),
    "identity": lambda z: z,
}
NORMS = ("layer", "rms")


class Weights(NamedTuple):
    """The tensors of one adapter, or of ``S`` adapters with a leading dimension of slots; None where there is none.

    Attributes:
        down: ``[H, K]``; down_bias: ``[H]``; up: ``[N, H]``; up_bias: ``[N]``; scale: ``[1]`` or ``[N]``, if learned;
            norm_weight, norm_bias: ``[K]``.
    """

    down: Tensor
    down_bias: Tensor | None
    up: Tensor
    up_bias: Tensor | None
    scale: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None

    def of(self, slot: int) -> "Weights":
        """Those of one slot."""
        return Weights(*(None if t is None else t[slot] for t in self))


class Settings(NamedTuple):
    """What is no tensor. ``scale`` is 1 where it is learned; ``own``: the residual is x itself."""

    activation: str
    scale: float
    norm: str
    eps: float
    dropout: float
    own: bool


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
        x: ``[..., K]``; residual: ``[..., N]``, gives y its dtype; the rest as in ``Weights``.
        activation: one of ``ACTIVATIONS``; norm: one of ``NORMS``, applied where there is a norm_weight.
        scale: a number, or a tensor ``[1]`` or ``[N]``.
        dropout: probability of dropping an element of the branch, in [0, 1); seed: one int64 element, or one a slot.
        slots: the rows' adapters, x's leading shape, -1 for none: the weights (and a scale that is a tensor) then have
            a leading dimension. The dropout mask's rows count the slot's own rows.

    Returns:
        ``[..., N]`` in the residual's dtype, or x's.
    """
    z, y = x.reshape(-1, x.shape[-1]), x.new_zeros(x[..., 0].numel(), up_weight.shape[-2])
    y = y if residual is None else residual.reshape(y.shape)
    tensor = scale if isinstance(scale, Tensor) else None
    weights = Weights(down_weight, down_bias, up_weight, up_bias, tensor, norm_weight, norm_bias)
    settings = Settings(activation, 1.0 if tensor is not None else scale, norm, eps, dropout, False)
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
    mask = _mask(u, settings, seed)
    return u if mask is None else u * mask * inverse_keep(settings.dropout)


def _normalise(x: Tensor, weights: Weights, settings: Settings) -> Tensor:
    norm_weight, norm_bias = weights.norm_weight, weights.norm_bias
    if settings.norm == "layer":
        return F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, settings.eps)
    y = F.rms_norm(x, x.shape[-1:], norm_weight, settings.eps)
    return y if norm_bias is None else y + norm_bias


def forward(
    x: Tensor, weights: Weights, residual: Tensor | None, settings: Settings, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y, and what ``backward`` reads the activation's derivative from: the hidden values, see ``empty_kept``."""
    kept = empty_kept(x, weights.down, weights.norm_weight is not None)
    z, stats = _kept_views(kept, weights.down, len(x))
    a = x.to(weights.down.dtype)
    if stats is not None and settings.norm == "layer":
        a, *found = torch.native_layer_norm(a, a.shape[1:], weights.norm_weight, weights.norm_bias, settings.eps)
        stats[0], stats[1] = found[0][:, 0], found[1][:, 0]
    elif weights.norm_weight is not None:
        a = _normalise(a, weights, settings)
    _linear(a, weights.down, weights.down_bias, 1.0, out=z)
    h = _activate(z, settings.activation)
    up, up_bias = _scaled(weights)
    residual = x if settings.own else residual
    mask, factor = _mask(h, settings, seed, up.shape[0]), settings.scale * inverse_keep(settings.dropout)
    u = _linear(h, up, up_bias, factor)
    u = u if mask is None else u.mul_(mask)
    # Not the product on top of the residual: one pass less, but rounded twice at the residual's magnitude.
    y = u if residual is None else u.add_(residual) if u.dtype == residual.dtype else residual + u
    return y.to(x.dtype if residual is None else residual.dtype), kept


def backward(
    dy: Tensor,
    x: Tensor,
    kept: Tensor,
    weights: Weights,
    settings: Settings,
    seed: Tensor | None,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """dx and the gradient of every one of the ``weights``; None where ``needs``, in this order, does not ask for it.

    Where ``needs_x`` says so, x serves for its dtype alone.
    """
    need_x, need_down, need_down_bias, *_, need_norm, need_norm_bias = needs
    dtype, factor = kept.dtype, settings.scale * inverse_keep(settings.dropout)
    kept, stats = _kept_views(kept, weights.down, len(dy))
    mask = _mask(kept, settings, seed, weights.up.shape[0])
    g = dy.to(dtype) if mask is None else mask.mul_(dy)
    up, _ = _scaled(weights)
    dup, dup_bias, dscale = _up_backward(g, kept, weights, settings, factor, needs[3:6])
    dx = ddown = ddown_bias = dnorm = dnorm_bias = None
    if need_x or need_down or need_down_bias or need_norm or need_norm_bias:
        ds = _derivative(_product(g, up, factor), kept, settings.activation)
        ddown_bias = ds.sum(0) if need_down_bias else None
        need_norms = need_x, need_norm, need_norm_bias
        dx, ddown, dnorm, dnorm_bias = _down_backward(dy, ds, x, stats, weights, settings, need_down, need_norms)
    found = dx, ddown, ddown_bias, dup, dup_bias, dscale, dnorm, dnorm_bias
    return tuple(grad if need else None for grad, need in zip(found, needs, strict=True))


def _up_backward(g, kept, weights, settings, factor, needs):
    """d(up), d(up_bias), d(scale)."""
    need_up, need_up_bias, need_scale = needs
    up, up_bias, scale = weights.up, weights.up_bias, weights.scale
    if scale is None:
        dup = _product(_hidden(kept, settings.activation).T, g, factor).T.contiguous() if need_up else None
        return dup, _times(g.sum(0), factor) if need_up_bias else None, None
    wide = torch.promote_types(g.dtype, torch.float32)
    dup = dup_bias = dscale = None
    if need_up or need_scale:  # in float32, for the scale's sake
        dup = _sum_of_products(g.to(wide), _hidden(kept, settings.activation).to(wide)).mul_(factor)
    if need_up_bias or (need_scale and up_bias is not None):
        dup_bias = g.sum(0, dtype=wide).mul_(factor)
    if need_scale:
        dscale = (dup * up).sum(1)
        dscale = dscale if up_bias is None else dscale.add_(dup_bias * up_bias)
        dscale = (dscale.sum(0, keepdim=True) if len(scale) == 1 else dscale).to(g.dtype)
    dup = dup.mul_(scale[:, None]).to(g.dtype) if need_up else None
    return dup, dup_bias.mul_(scale).to(g.dtype) if need_up_bias else None, dscale


def _sum_of_products(left: Tensor, right: Tensor, parts: int = 8) -> Tensor:
    """``leftᵀ right``, the rows in ``parts``: shorter chains of additions err less, which a sum of them all shows."""
    rows = len(left) // parts * parts
    blocks = (t[:rows].reshape(parts, rows // parts, t.shape[1]) for t in (left, right))
    total = torch.bmm(next(blocks).mT, next(blocks)).sum(0)
    return total if rows == len(left) else total.addmm_(left[rows:].T, right[rows:])


def _down_backward(dy, ds, x, stats, weights, settings, need_down, need_norms):
    """dx, d(down), d(norm_weight), d(norm_bias) of the projection to the hidden values and of the norm before it."""
    need_x = need_norms[0]
    if weights.norm_weight is None:
        ddown = ds.T @ x.to(ds.dtype) if need_down else None
        if not need_x:
            return None, ddown, None, None
        if settings.own and dy.dtype == ds.dtype == x.dtype:
            return torch.addmm(dy, ds, weights.down), ddown, None, None
        dx = ds @ weights.down
        return (dx.add_(dy) if settings.own else dx).to(x.dtype), ddown, None, None
    if stats is not None and settings.norm == "layer":
        dz, ddown, dnorm, dnorm_bias = _layer_backward(ds, x, stats, weights, need_down, need_norms)
        if need_x:
            dz = (dz.add_(dy) if settings.own else dz).to(x.dtype)
        return dz, ddown, dnorm, dnorm_bias
    z, size = x.to(ds.dtype), x.shape[1:]
    da = ds @ weights.down if any(need_norms) else None
    if settings.norm == "layer":
        a, *stats = torch.native_layer_norm(z, size, weights.norm_weight, weights.norm_bias, settings.eps)
        ddown = ds.T @ a if need_down else None
        operands = *stats, weights.norm_weight, weights.norm_bias
        dz, dnorm, dnorm_bias = (
            torch.ops.aten.native_layer_norm_backward(da, z, size, *operands, list(need_norms))
            if any(need_norms)
            else (None, None, None)
        )
    else:
        ddown, dz, dnorm, dnorm_bias = _rms_backward(ds, da, z, weights, settings, need_down, need_norms)
    if need_x:
        dz = (dz.add_(dy) if settings.own else dz).to(x.dtype)
    return dz if need_x else None, ddown, dnorm, dnorm_bias


def _layer_backward(ds, x, stats, weights, need_down, need_norms):
    """With the rows' means and deviations at hand all gradients of weights follow from ``dsᵀ x̂``, and that from x."""
    need_x, need_norm, need_norm_bias = need_norms
    z, (mean, rstd), norm_weight = x.to(ds.dtype), stats, weights.norm_weight
    ddown = dnorm = dnorm_bias = dz = None
    if need_down or need_norm:
        outer = (ds * rstd[:, None]).T @ (z - mean[:, None])
        dnorm = (outer * weights.down).sum(0) if need_norm else None
        ddown = outer.mul_(norm_weight) if need_down else None
        if need_down and weights.norm_bias is not None:
            ddown.addr_(ds.sum(0), weights.norm_bias)
    if need_norm_bias:
        dnorm_bias = ds.sum(0) @ weights.down
    if need_x:
        operands = mean[:, None], rstd[:, None], norm_weight, weights.norm_bias, [True, False, False]
        dz, _, _ = torch.ops.aten.native_layer_norm_backward(ds @ weights.down, z, x.shape[1:], *operands)
    return dz, ddown, dnorm, dnorm_bias


def _rms_backward(ds, da, z, weights, settings, need_down, need_norms):
    need_x, need_norm, need_norm_bias = need_norms
    wide = torch.promote_types(z.dtype, torch.float32)
    rstd = torch.linalg.vector_norm(z, dim=1, keepdim=True, dtype=wide).square_()
    rstd = rstd.div_(z.shape[1]).add_(settings.eps).rsqrt_()
    normal = z * rstd
    ddown = dz = None
    if need_down:
        a = normal * weights.norm_weight
        a = a if weights.norm_bias is None else a.add_(weights.norm_bias)
        ddown = ds.T @ a.to(ds.dtype)
    dnorm = (da * normal).sum(0).to(da.dtype) if need_norm else None
    dnorm_bias = da.sum(0) if need_norm_bias else None
    if need_x:
        dnormal = da * weights.norm_weight
        mean = (dnormal * normal).mean(1, keepdim=True)
        dz = dnormal.to(wide).sub_(normal.mul_(mean)).mul_(rstd).to(z.dtype)
    return ddown, dz, dnorm, dnorm_bias


def grouped_forward(
    x: Tensor,
    weights: Weights,
    residual: Tensor | None,
    settings: Settings,
    seeds: Tensor | None,
    routing: Routing,
) -> tuple[Tensor, Tensor]:
    """``forward`` of each slot's rows; a row without an adapter is its residual, or 0."""
    residual = x if settings.own else residual
    y = (
        x.new_zeros(len(x), weights.up.shape[1])
        if residual is None
        else residual.clone(memory_format=torch.contiguous_format)
    )
    kept = empty_kept(x, weights.down, weights.norm_weight is not None)
    settings, size = settings._replace(own=False), kept.numel() // max(len(x), 1)
    for slot, rows, place in _rows(routing):
        part = None if residual is None else residual[rows]
        y[rows], kept_s = forward(x[rows], weights.of(slot), part, settings, _seed(seeds, slot))
        kept.view(-1)[place * size : (place + len(rows)) * size] = kept_s.view(-1)
    return y, kept


def grouped_backward(
    dy: Tensor,
    x: Tensor,
    kept: Tensor,
    weights: Weights,
    settings: Settings,
    seeds: Tensor | None,
    routing: Routing,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """``backward`` of each slot's rows. The gradients of slots without rows are 0."""
    dx = None
    if needs[0]:
        width = weights.down.shape[2]
        dx = dy.to(x.dtype, copy=True) if settings.own else dy.new_zeros(len(dy), width, dtype=x.dtype)
    grads = [
        torch.zeros_like(t, memory_format=torch.contiguous_format) if need else None
        for t, need in zip(weights, needs[1:], strict=True)
    ]
    size = kept.numel() // max(len(dy), 1)
    for slot, rows, place in _rows(routing):
        of_slot = weights.of(slot), settings, _seed(seeds, slot), needs
        kept_s = kept.view(-1)[place * size : (place + len(rows)) * size]
        kept_s = kept_s.view(len(rows), size) if kept.dim() == 2 else kept_s
        dx_s, *found = backward(dy[rows], x[rows] if len(x) else x, kept_s, *of_slot)
        if dx is not None:
            dx[rows] = dx_s
        for grad, part in zip(grads, found, strict=True):
            if grad is not None:
                grad[slot] = part
    return dx, *grads


def empty_kept(x: Tensor, down: Tensor, norm: bool) -> Tensor:
    """Memory for what ``forward`` keeps: the hidden values ``[M, H]``, and for a narrow adapter with a norm two numbers
    a row behind them, with which ``backward`` need not normalise again."""
    hidden, k = down.shape[-2:]
    numbers = 2 if norm and 4 * hidden <= k and down.dtype.itemsize > 2 else 0
    m = x.shape[0]
    return x.new_empty(m * (hidden + numbers) if numbers else (m, hidden), dtype=down.dtype)


def _kept_views(kept: Tensor, down: Tensor, m: int) -> tuple[Tensor, Tensor | None]:
    if kept.dim() == 2:
        return kept, None
    z, stats = kept.split([m * down.shape[-2], 2 * m])
    return z.view(m, -1), stats.view(2, m)


def needs_x(needs: tuple[bool, ...], norm: bool) -> bool:
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


def _scaled(weights: Weights) -> tuple[Tensor, Tensor | None]:
    """The up projection times the learned scale."""
    up, up_bias, scale = weights.up, weights.up_bias, weights.scale
    if scale is None:
        return up, up_bias
    return up * scale[:, None], None if up_bias is None else up_bias * scale


def _activate(z: Tensor, activation: str) -> Tensor:
    """In place where the result tells the derivative."""
    if activation == "relu":
        return z.relu_()
    if activation == "tanh":
        return z.tanh_()
    return F.leaky_relu_(z, LEAKY_SLOPE) if activation == "leaky_relu" else ACTIVATIONS[activation](z)


def _hidden(kept: Tensor, activation: str) -> Tensor:
    """``act`` from what ``_activate`` has left."""
    return ACTIVATIONS[activation](kept) if activation in ("gelu", "gelu_tanh", "silu") else kept


def _derivative(dh: Tensor, kept: Tensor, activation: str) -> Tensor:
    aten = torch.ops.aten
    if activation == "relu":
        return aten.threshold_backward(dh, kept, 0)
    if activation == "leaky_relu":
        return aten.leaky_relu_backward(dh, kept, LEAKY_SLOPE, True)
    if activation == "tanh":
        return aten.tanh_backward(dh, kept)
    if activation == "silu":
        return aten.silu_backward(dh, kept)
    if activation == "identity":
        return dh
    return aten.gelu_backward(dh, kept, approximate="tanh" if activation == "gelu_tanh" else "none")


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, factor: float, out: Tensor | None = None) -> Tensor:
    """``factor · (x Wᵀ + bias)``."""
    out = x.new_empty(len(x), len(weight)) if out is None else out
    if bias is None:
        return out.addmm_(x, weight.T, beta=0, alpha=factor)
    return torch.addmm(bias, x, weight.T, beta=factor, alpha=factor, out=out)


def _product(left: Tensor, right: Tensor, factor: float) -> Tensor:
    return left.new_empty(left.shape[0], right.shape[1]).addmm_(left, right, beta=0, alpha=factor)


def _times(value: Tensor, factor: float) -> Tensor:
    return value if factor == 1.0 else value.mul_(factor)


def _mask(like: Tensor, settings: Settings, seed: Tensor | None, columns: int | None = None) -> Tensor | None:
    if not threshold(settings.dropout):
        return None
    return keep_mask(seed, settings.dropout, like.shape[0], columns or like.shape[1], like.dtype)
