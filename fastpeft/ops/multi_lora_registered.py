"""multi_lora as PyTorch knows it: implementation, shapes, gradient, registration. ``multi_lora.py`` has the formula."""

import torch

from .. import _backend, reference
from .._library import register_inplace_op, register_op
from .._mask import LANES
from ..reference import Routing, Slots
from .routing import slots_of


def _implementation(x, lora_as, lora_bs, ys, order, starts, tiles, scales, ranks, thresholds, seeds, tile, backend):
    impl, routing, slots = _prepare(order, starts, tiles, scales, ranks, thresholds, seeds, tile, backend)
    outs = [
        y.clone(memory_format=torch.contiguous_format) if y.dim() == 2 else x.new_zeros(x.shape[0], b.shape[1])
        for y, b in zip(ys, lora_bs, strict=True)
    ]
    return outs, impl.forward(outs, x, lora_as, lora_bs, routing, slots)


def _inplace(ys, x, lora_as, lora_bs, order, starts, tiles, scales, ranks, tile, backend):
    absent = x.new_empty(0)
    impl, routing, slots = _prepare(order, starts, tiles, scales, ranks, absent, absent, tile, backend)
    impl.add_(ys, x, lora_as, lora_bs, routing, slots)


def _fake(x, lora_as, lora_bs, ys, order, starts, tiles, scales, ranks, thresholds, seeds, tile, backend):
    outs = [x.new_empty(x.shape[0], b.shape[1]) for b in lora_bs]
    rank, dtype = sum(a.shape[1] for a in lora_as), torch.promote_types(lora_as[0].dtype, torch.float32)
    planes = _backend.load("multi_lora", backend).planes(x.shape[1], tile, lora_as[0].dtype)
    return outs, x.new_empty(planes, x.shape[0], rank, dtype=dtype)


def _setup_context(ctx, inputs, output):
    x, lora_as, lora_bs, ys, *tables, tile, backend = inputs
    ctx.needs = [x.requires_grad, *(any(t.requires_grad for t in ts) for ts in (lora_as, lora_bs, ys))]
    _, need_da, need_db, _ = ctx.needs
    absent = x.new_empty(0)
    ctx.save_for_backward(x if need_da else absent, output[1] if need_db else absent, *tables, *lora_as, *lora_bs)
    ctx.settings = len(lora_as), tile, backend


def _backward(ctx, grads, _):
    x, s, *rest = ctx.saved_tensors
    count, tile, backend = ctx.settings
    tables, lora_as, lora_bs = rest[:7], rest[7 : 7 + count], rest[7 + count :]
    dys = [x.new_zeros(len(tables[0]), b.shape[1]) if dy is None else dy for dy, b in zip(grads, lora_bs, strict=True)]
    dx, *flat = _multi_lora_backward(dys, x, s, lora_as, lora_bs, *tables, ctx.needs, tile, backend)
    need_dx, need_da, need_db, need_dy = ctx.needs
    das, dbs = (flat[:count] if need_da else [None] * count), (flat[count:] if need_db else [None] * count)
    return dx if need_dx else None, das, dbs, dys if need_dy else [None] * count, *[None] * 9


def _definition(ctx, grads):
    x, _, *rest = ctx.saved_tensors
    count = ctx.settings[0]
    order, starts, _, scales, ranks, thresholds, seeds = rest[:7]
    lora_as, lora_bs, tokens = rest[7 : 7 + count], rest[7 + count :], len(order)
    if x.dim() == 1:  # not kept: then the gradient of B alone depends on it
        if ctx.needs[2]:
            raise RuntimeError(
                "multi_lora: create_graph=True with a frozen lora_a, expected a trained one: x is not kept"
            )
        x = x.new_zeros(tokens, lora_as[0].shape[2], requires_grad=ctx.needs[0])
    ys = [x.new_zeros(tokens, b.shape[1], requires_grad=ctx.needs[3]) for b in lora_bs]
    token_slots = slots_of(order, starts)
    dropouts = [t / LANES for t in thresholds.tolist()] if thresholds.numel() else None

    def of(table, p):
        return None if not table.numel() else table[p] if table.dim() == 2 else table

    def outputs(x, lora_as, lora_bs, ys, *_):
        return [
            reference.multi_lora(x, a, b, token_slots, of(scales, p), of(ranks, p), y, dropouts, of(seeds, p))
            for p, (a, b, y) in enumerate(zip(lora_as, lora_bs, ys, strict=True))
        ]

    return (x, lora_as, lora_bs, ys, *[None] * 9), outputs


def _backward_implementation(
    dys, x, s, lora_as, lora_bs, order, starts, tiles, scales, ranks, thresholds, seeds, needs, tile, backend
):
    """``[dX, *dA, *dB]``; what is not needed is an empty tensor."""
    impl, routing, slots = _prepare(order, starts, tiles, scales, ranks, thresholds, seeds, tile, backend)
    need_dx, need_da, need_db, _ = needs
    dx = das = dbs = None
    if need_dx or need_da or need_db:
        x = x if need_da else dys[0].new_empty(1, 1).expand(dys[0].shape[0], lora_as[0].shape[2])
        dx, das, dbs = impl.backward(dys, x, s, lora_as, lora_bs, routing, slots, need_dx, need_da, need_db)
    absent = [None] * len(dys)
    return [dys[0].new_empty(0) if grad is None else grad for grad in (dx, *(das or absent), *(dbs or absent))]


def _backward_fake(dys, x, s, lora_as, lora_bs, order, *rest):
    *_, needs, _, _ = rest
    need_dx, need_da, need_db, _ = needs
    empty = dys[0].new_empty
    return [
        empty(order.shape[0], lora_as[0].shape[2]) if need_dx else empty(0),
        *(empty(a.shape, dtype=a.dtype) if need_da else empty(0) for a in lora_as),
        *(empty(b.shape, dtype=b.dtype) if need_db else empty(0) for b in lora_bs),
    ]


def _prepare(order, starts, tiles, scales, ranks, thresholds, seeds, tile, backend):
    slots = Slots(scales, *(table if table.numel() else None for table in (ranks, thresholds, seeds)))
    routing = Routing(order, starts, tiles, starts.shape[0] - 1, tile)
    return _backend.load("multi_lora", backend), routing, slots


_ROUTING = "Tensor order, Tensor starts, Tensor tiles, Tensor scales, Tensor ranks"
_DROPOUT = "Tensor thresholds, Tensor seeds"
_multi_lora_backward = register_op(
    "multi_lora_backward",
    f"(Tensor[] dys, Tensor x, Tensor s, Tensor[] lora_as, Tensor[] lora_bs, {_ROUTING}, {_DROPOUT}, "
    "bool[] needs, int tile, str backend) -> Tensor[]",
    _backward_implementation,
    _backward_fake,
)
multi_lora = register_op(
    "multi_lora",
    f"(Tensor x, Tensor[] lora_as, Tensor[] lora_bs, Tensor[] ys, {_ROUTING}, {_DROPOUT}, int tile, str backend)"
    " -> (Tensor[], Tensor)",
    _implementation,
    _fake,
    _setup_context,
    _backward,
    _definition,
)
multi_lora_ = register_inplace_op(
    "multi_lora_",
    f"(Tensor(a!)[] ys, Tensor x, Tensor[] lora_as, Tensor[] lora_bs, {_ROUTING}, int tile, str backend) -> ()",
    _inplace,
)
