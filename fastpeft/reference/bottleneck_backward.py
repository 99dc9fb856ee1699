"""bottleneck's gradients, written out. ``run`` is what the reference offers as ``backward``."""

import torch
from torch import Tensor

from .bottleneck_terms import ACTIVATIONS, LEAKY_SLOPE, Settings, Weights, mask_of, product, reciprocal_rms, scaled_up
from .dropout import inverse_keep


def run(
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
    need_x, need_down, need_down_bias, *need_up, need_norm, need_norm_bias = needs
    hidden, factor = weights.down.shape[0], settings.scale * inverse_keep(settings.dropout)
    z = kept[:, :hidden].contiguous()  # of a slice gelu takes five times as long
    mask = mask_of(kept, len(dy), weights.up.shape[0], settings, seed)
    g = dy.to(kept.dtype) if mask is None else mask.mul_(dy)
    h = ACTIVATIONS[settings.activation](z)
    dup, dup_bias, dscale = _up_gradients(g, h, weights, factor, need_up)
    dx = ddown = ddown_bias = dnorm = dnorm_bias = None
    if need_x or need_down or need_down_bias or need_norm or need_norm_bias:
        dh = product(g, scaled_up(weights)[0], factor)
        dz = _derivative(dh, z, h, settings.activation)
        ddown_bias = dz.sum(0) if need_down_bias else None
        need_norms = need_x, need_down, need_norm, need_norm_bias
        if weights.norm_weight is None:
            ddown = dz.T @ x.to(dz.dtype) if need_down else None
            dx = _dx(dy, dz, x.dtype, weights.down, settings.own) if need_x else None
        elif any(need_norms):
            dx, ddown, dnorm, dnorm_bias = _norm_gradients(dy, dz, z, x, kept, weights, settings, need_norms)
    return dx, ddown, ddown_bias, dup, dup_bias, dscale, dnorm, dnorm_bias


def _up_gradients(g: Tensor, h: Tensor, weights: Weights, factor: float, needs: list[bool]) -> list[Tensor | None]:
    """d(up), d(up_bias), d(scale)."""
    need_up, need_up_bias, need_scale = needs
    up, up_bias, scale = weights.up, weights.up_bias, weights.scale
    if scale is None:
        dup = product(h.T, g, factor).T.contiguous() if need_up else None
        return [dup, _times(g.sum(0), factor) if need_up_bias else None, None]
    wide = torch.promote_types(g.dtype, torch.float32)
    dup = dup_bias = dscale = None
    if need_up or need_scale:  # in float32, for the scale's sake
        dup = _sum_of_products(g.to(wide), h.to(wide)).mul_(factor)
    if need_up_bias or (need_scale and up_bias is not None):
        dup_bias = g.sum(0, dtype=wide).mul_(factor)
    if need_scale:
        dscale = (dup * up).sum(1)
        dscale = dscale if up_bias is None else dscale.add_(dup_bias * up_bias)
        dscale = (dscale.sum(0, keepdim=True) if len(scale) == 1 else dscale).to(g.dtype)
    dup = dup.mul_(scale[:, None]).to(g.dtype) if need_up else None
    return [dup, dup_bias.mul_(scale).to(g.dtype) if need_up_bias else None, dscale]


def _sum_of_products(g: Tensor, h: Tensor, parts: int = 8) -> Tensor:
    """``gᵀ h``, the rows in ``parts``: shorter chains of additions err less, which a sum of them all shows."""
    rows = len(g) // parts * parts
    left, right = (t[:rows].unflatten(0, (parts, rows // parts)) for t in (g, h))
    total = torch.bmm(left.mT, right).sum(0)
    return total if rows == len(g) else total.addmm_(g[rows:].T, h[rows:])


def _dx(dy: Tensor, dz: Tensor, dtype: torch.dtype, down: Tensor, own: bool) -> Tensor:
    if own and dy.dtype == dz.dtype == dtype:
        return torch.addmm(dy, dz, down)
    dx = dz @ down
    return (dx.add_(dy) if own else dx).to(dtype)


def _norm_gradients(
    dy: Tensor, dz: Tensor, z: Tensor, x: Tensor, kept: Tensor, weights: Weights, settings: Settings, needs
) -> tuple[Tensor | None, ...]:
    """dx, d(down), d(norm_weight), d(norm_bias) of a projection with a norm before it.

    With ``x̂ = rstd (x - mean)`` the gradients of the weights follow from ``dz x̂``, and nothing of x's size is made but
    ``x - mean``, which becomes dx.
    """
    need_x, need_down, need_norm, need_norm_bias = needs
    dtype, wide = dz.dtype, torch.promote_types(dz.dtype, torch.float32)
    tensors = weights.down, weights.down_bias, weights.norm_weight, weights.norm_bias
    down, down_bias, norm_weight, norm_bias = (None if t is None else t.to(wide) for t in tensors)
    hidden = len(down)
    dz, (centred, rstd) = dz.to(wide), _centred(x.to(wide), kept[:, hidden:].unbind(1), settings)
    dzr = dz * rstd[:, None]
    dx = ddown = dnorm = dnorm_bias = None
    if need_down or need_norm:
        outer = dzr.T @ centred
        dnorm = (outer * down).sum(0) if need_norm else None
        ddown = outer.mul_(norm_weight) if need_down else None
    if norm_bias is not None and (need_down or need_norm_bias):
        sums = dz.sum(0)
        ddown = ddown.addr_(sums, norm_bias) if need_down else None
        dnorm_bias = sums @ down if need_norm_bias else None
    if need_x:
        narrow = down * norm_weight
        if settings.norm == "layer":
            narrow.sub_(narrow.mean(1, keepdim=True))
        z = z if kept.shape[1] > hidden else None
        biases = down_bias, None if norm_bias is None else down @ norm_bias
        q = _along(dzr, z, centred, rstd, narrow, *biases)[:, None]
        room = centred if settings.norm == "layer" else torch.empty_like(centred)
        dx = torch.addcmul(dy, centred, q, out=room) if settings.own else torch.mul(centred, q, out=room)
        dx = dx.addmm_(dzr, narrow).to(x.dtype)
    return (dx, *(t if t is None else t.to(dtype) for t in (ddown, dnorm, dnorm_bias)))


def _along(dzr, z, centred, rstd, narrow, *biases):
    """q ``[M]`` in ``dx = dzr D' + (x - mean) q``, where dzr is ``dz ∘ rstd`` and D' is ``D ∘ norm_weight``,
    less each row's mean under a LayerNorm: narrow.

    ``q = -rstd Σ_h dzr ∘ (x̂ D'ᵀ) / K``. What is in brackets is z without its biases, where z has bits enough for that.
    """
    if z is None:
        z = (centred @ narrow.T).mul_(rstd[:, None])
    else:
        biases = [bias for bias in biases if bias is not None]
        z = z - sum(biases[1:], start=biases[0]) if biases else z
    return (dzr * z).sum(1).mul_(rstd).mul_(-1.0 / narrow.shape[1])


def _centred(x: Tensor, stats: tuple[Tensor, ...], settings: Settings) -> tuple[Tensor, Tensor]:
    """``x - mean``, or x itself under an RMSNorm, and the rows' 1 / deviation; from what ``forward`` kept if it did."""
    if settings.norm == "rms":
        return x, stats[0] if len(stats) else reciprocal_rms(x, settings.eps)
    centred = x - (stats[0][:, None] if len(stats) else x.mean(1, keepdim=True))
    return centred, stats[1] if len(stats) else reciprocal_rms(centred, settings.eps)


def _derivative(dh: Tensor, z: Tensor, h: Tensor, activation: str) -> Tensor:
    aten = torch.ops.aten
    if activation == "relu":
        return aten.threshold_backward(dh, z, 0)
    if activation == "leaky_relu":
        return aten.leaky_relu_backward(dh, z, LEAKY_SLOPE, False)
    if activation == "tanh":
        return aten.tanh_backward(dh, h)
    if activation == "silu":
        return aten.silu_backward(dh, z)
    if activation == "identity":
        return dh
    return aten.gelu_backward(dh, z, approximate="tanh" if activation == "gelu_tanh" else "none")


def _times(value: Tensor, factor: float) -> Tensor:
    return value if factor == 1.0 else value.mul_(factor)
