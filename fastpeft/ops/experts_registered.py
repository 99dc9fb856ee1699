"""experts as PyTorch knows it, one projection at a time: implementation, shapes, gradient, registration.

``experts.py`` has the formula.
"""

from typing import Any

import torch

from .. import _backend
from .._library import register_op
from ..reference.experts import ExpertRouting, experts_of_rows
from ..reference.experts_grouped import grouped_matmul, laid_out_as
from ..reference.routing import Routing


def _implementation(x, weight, bias, lora_a, lora_b, weights, seeds, tables, scale, dropout, tile, up, backend):
    impl, routing = _backend.load("experts", backend), _routing(tables, tile)
    rows = x.index_select(0, routing.tokens) if up else x
    y = grouped_matmul(rows, weight.mT, routing.rows.starts)
    if bias.numel():
        y.add_(bias.index_select(0, experts_of_rows(routing.rows)))
    s = x.new_empty(0)
    if lora_a.numel():
        s = impl.shrink(rows, lora_a, routing.rows, scale, dropout, seeds)
        impl.expand_(y, s, lora_b, routing.rows, 0.0, None)
    return [y if up else impl.combine(y, weights, routing, y.dtype)], s


def _fake(x, weight, bias, lora_a, lora_b, weights, seeds, tables, scale, dropout, tile, up, backend):
    tokens, places = tables[:2]
    y = x.new_empty(tokens.shape[0] if up else places.shape[0], weight.shape[1])
    shape = (tokens.shape[0], lora_a.shape[1]) if lora_a.dim() == 3 else (0,)
    return [y], x.new_empty(shape, dtype=torch.promote_types(lora_a.dtype, torch.float32))


def _setup_context(ctx, inputs, output):
    x, weight, bias, lora_a, lora_b, weights, seeds, tables, *ctx.settings = inputs
    ctx.needs = [t.requires_grad for t in (x, weight, bias, lora_a, lora_b, weights)]
    ctx.save_for_backward(*kept(ctx.needs, x, output[1]), weight, bias, lora_a, lora_b, weights, seeds, *tables)


def kept(needs, x, s):
    """x and S, where the gradients that are asked for read them."""
    _, need_dw, _, need_da, need_db, need_dweights = needs
    absent = x.new_empty(0)
    return x if need_dw or need_da or need_dweights else absent, s if need_db or need_dweights else absent


def _backward(ctx, grads, _):
    x, s, weight, bias, lora_a, lora_b, weights, seeds, *tables = ctx.saved_tensors
    found = expert_linear_backward(
        grads[0], x, s, weight, bias, lora_a, lora_b, weights, seeds, tables, ctx.needs, *ctx.settings
    )
    return *(grad if need else None for grad, need in zip(found, ctx.needs, strict=True)), None, [None] * 5, *[None] * 5


def no_second_gradients(ctx, grads):
    raise RuntimeError("experts: gradients of gradients are not served; fastpeft.reference.experts has them")


def _backward_implementation(
    dy, x, s, weight, bias, lora_a, lora_b, weights, seeds, tables, needs, scale, dropout, tile, up, backend
):
    """``[dx, dweight, dbias, dlora_a, dlora_b, dweights]``; what is not needed is an empty tensor."""
    impl, routing = _backend.load("experts", backend), _routing(tables, tile)
    rows, places = routing.rows, routing.places
    need_dx, need_dw, need_dbias, need_da, need_db, need_dweights = needs
    dx: Any = None
    ds: Any = None
    dw = dbias = da = db = dweights = None
    d = dy if up else dy.to(weight.dtype).index_select(0, routing.tokens)
    low_rank = bool(lora_a.numel())
    if low_rank and (need_dx or need_da or need_dweights):
        ds = impl.shrink(d, lora_b.mT, rows, scale, 0.0, None)
    wide = torch.promote_types(d.dtype, torch.float32)
    if need_dx or need_dweights:
        dx = grouped_matmul(d, weight, rows.starts)
    if need_dweights:
        of_row = (dx.to(wide) * x).sum(1)
        if bias.numel():
            of_row += (d.to(wide) * bias.index_select(0, experts_of_rows(rows))).sum(1)
        if low_rank and scale:
            of_row += (ds * s).sum(1).div_(scale)
        dweights = torch.where(places < rows.starts[-1], of_row[places], 0).to(weights.dtype)
    if need_dx and low_rank:
        impl.expand_(dx, ds, lora_a.mT, rows, dropout, seeds)
    w: Any = None if up else _of_rows(weights, places)
    weighted = (lambda t: t) if up else lambda t: t * w.to(t.dtype)
    if need_da:
        da = laid_out_as(impl.dlora_a(weighted(ds), x, routing, up, dropout, seeds, lora_a.dtype), lora_a)
    if need_db:
        db = laid_out_as(impl.dlora_b(d, weighted(s), routing, lora_b.dtype), lora_b)
    if need_dw:
        dw = laid_out_as(impl.dlora_a(weighted(d.to(wide)), x, routing, up, 0.0, None, weight.dtype), weight)
    if need_dbias:
        dbias = impl.dbias(d, weighted(d.new_ones(len(d), 1, dtype=wide)), routing, bias.dtype)
    if need_dx:
        dx = impl.combine(dx, None, routing, dx.dtype) if up else dx.mul_(w.to(dx.dtype))
    found = dx if need_dx else None, dw, dbias, da, db, dweights
    return [dy.new_empty(0) if grad is None else grad for grad in found]


def _backward_fake(dy, x, s, weight, bias, lora_a, lora_b, weights, seeds, tables, needs, *settings):
    *_, up, _ = settings
    tokens, places = tables[:2]
    dx = weight.new_empty((places if up else tokens).shape[0], weight.shape[2])
    pairs = ((t.new_empty(t.shape), t) for t in (weight, bias, lora_a, lora_b))
    parameters = (laid_out_as(grad, t) if t.dim() == 3 else grad for grad, t in pairs)
    grads = dx, *parameters, weights.new_empty(weights.shape)
    return [grad if need else dy.new_empty(0) for grad, need in zip(grads, needs, strict=True)]


def _routing(tables, tile) -> ExpertRouting:
    tokens, places, order, starts, tiles = tables
    return ExpertRouting(tokens, places, Routing(order, starts, tiles, starts.shape[0] - 1, tile))


def _of_rows(weights: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """The router's weight of each row: ``[M, 1]``."""
    rows = weights.new_empty(places.numel())
    return rows.index_copy_(0, places.reshape(-1).long(), weights.reshape(-1))[:, None]


_OPERANDS = "Tensor weight, Tensor bias, Tensor lora_a, Tensor lora_b, Tensor weights, Tensor seeds, Tensor[] tables, "
_SETTINGS = "float scale, float dropout, int tile, bool up, str backend"
expert_linear_backward = register_op(
    "expert_linear_backward",
    f"(Tensor dy, Tensor x, Tensor s, {_OPERANDS}bool[] needs, {_SETTINGS}) -> Tensor[]",
    _backward_implementation,
    _backward_fake,
)
expert_linear = register_op(
    "expert_linear",
    f"(Tensor x, {_OPERANDS}{_SETTINGS}) -> (Tensor[], Tensor)",
    _implementation,
    _fake,
    _setup_context,
    _backward,
    no_second_gradients,
)
