"""bottleneck's gradients, written out, for the rows of one adapter."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._mask import inverse_keep
from .bottleneck_terms import (
    ACTIVATIONS,
    LEAKY_SLOPE,
    Settings,
    Weights,
    given,
    mask_of,
    normalised,
    product,
    scaled_up,
)


def run(
    dy: Tensor,
    x: Tensor,
    z: Tensor,
    weights: Weights,
    settings: Settings,
    seed: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """dx and the gradient of every one of the ``weights``; None where ``needs``, in this order, does not ask for it.

    ``z`` is what ``forward`` kept. Where ``needs_x`` says so, x serves for its dtype alone.
    """
    need_x, need_down, need_down_bias, *need_up, need_norm, need_norm_bias = needs
    factor = settings.scale * inverse_keep(settings.dropout)
    mask = mask_of(z, len(dy), weights.up.shape[0], settings, seed)
    g = dy.to(z.dtype) if mask is None else mask.mul_(dy)
    h = ACTIVATIONS[settings.activation](z)
    found = _up_gradients(g, h, weights, factor, need_up)
    dx = ddown = ddown_bias = dnorm = dnorm_bias = None
    if need_x or need_down or need_down_bias or need_norm or need_norm_bias:
        dz = _derivative(product(g, scaled_up(weights)[0], factor), z, h, settings.activation)
        ddown_bias = dz.sum(0) if need_down_bias else None
        if weights.norm_weight is None:
            ddown = dz.T @ x.to(dz.dtype) if need_down else None
            dx = _dx(dy, dz, x.dtype, weights.down, settings.own) if need_x else None
        else:
            a, stats = normalised(x.to(dz.dtype), weights, settings)  # again: that is one pass over x
            ddown = dz.T @ a if need_down else None
            if need_x or need_norm or need_norm_bias:
                wanted = need_x, need_norm, need_norm_bias
                dx, dnorm, dnorm_bias = _through_norm(dz @ weights.down, x, stats, weights, settings, wanted)
                dx = None if dx is None else (dx.add_(dy) if settings.own else dx).to(x.dtype)
    return dx, ddown, ddown_bias, *found, dnorm, dnorm_bias


def _up_gradients(g: Tensor, h: Tensor, weights: Weights, factor: float, needs: list[bool]) -> list[Tensor | None]:
    """d(up), d(up_bias), d(scale)."""
    need_up, need_up_bias, need_scale = needs
    up, up_bias, scale = weights.up, weights.up_bias, weights.scale
    if scale is None:
        dup = product(g.T, h, factor) if need_up else None
        return [dup, _times(g.sum(0), factor) if need_up_bias else None, None]
    wide = torch.promote_types(g.dtype, torch.float32)
    dup = dup_bias = dscale = None
    if need_up or need_scale:  # in float32, for the scale's sake
        dup = _sum_of_products(g.to(wide), h.to(wide)).mul_(factor)
    if need_up_bias or (need_scale and up_bias is not None):
        dup_bias = g.sum(0, dtype=wide).mul_(factor)
    if need_scale:
        dscale = (given(dup) * up).sum(1)
        dscale = dscale if up_bias is None else dscale.add_(given(dup_bias) * up_bias)
        dscale = (dscale.sum(0, keepdim=True) if len(scale) == 1 else dscale).to(g.dtype)
    dup = given(dup).mul_(scale[:, None]).to(g.dtype) if need_up else None
    return [dup, given(dup_bias).mul_(scale).to(g.dtype) if need_up_bias else None, dscale]


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


def _through_norm(
    da: Tensor, x: Tensor, stats: tuple[Tensor, ...], weights: Weights, settings: Settings, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """The gradients of x and of the norm's weight and bias from that of the normalised x."""
    x, norm_weight, norm_bias = x.to(da.dtype), weights.norm_weight, weights.norm_bias
    if settings.norm == "layer":
        backward = torch.ops.aten.native_layer_norm_backward
        return backward(da, x, x.shape[1:], *stats, norm_weight, norm_bias, needs)
    need_x, need_norm, need_norm_bias = needs
    (rstd,) = stats
    unit = x * rstd[:, None]
    dnorm = (da * unit).sum(0).to(da.dtype) if need_norm else None
    dnorm_bias = da.sum(0) if need_norm_bias else None
    if not need_x:
        return None, dnorm, dnorm_bias
    da = da.to(unit.dtype) * given(norm_weight)
    along = (da * unit).mean(1, keepdim=True)
    return da.sub_(unit.mul_(along)).mul_(rstd[:, None]), dnorm, dnorm_bias


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
