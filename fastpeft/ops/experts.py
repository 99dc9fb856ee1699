"""LoRA on the experts of a mixture-of-experts layer, forward and backward.

    up     u[m] = W_e x[t] + bias_e + B_e S[m]                       S[m] = scale · A_e drop(x[t])
    down   y[t] = Σ_m w[m] (W_e h[m] + bias_e + B_e S[m])            S[m] = scale · A_e drop(h[m])
           dS[m] = scale · B_eᵀ d[m]                                 d[m] = du[m], or dy[t]
           g[m] = W_eᵀ d[m] + mask ∘ (A_eᵀ dS[m]) / (1 - p)
    up     dx[t] = Σ_m g[m]           dA_e = Σ dS[m] drop(x[t])ᵀ     dB_e = Σ d[m] S[m]ᵀ     dbias_e = Σ d[m]
    down   dh[m] = w[m] g[m]          the same sums, of w[m] d[m]
           dw[m] = (W_eᵀ d[m])·h[m] + dS[m]·S[m] / scale + d[m]·bias_e

A row m is a pair of a token t and one of its experts e. Rows are sorted by expert once a layer, on the device. The
frozen products are PyTorch's ``grouped_mm``, the low-rank ones ``multi_lora``'s kernels with experts for slots, on a
CPU ``grouped_mm`` too. Since down is linear in h, the gradient of the router's weights needs no expert's output; it
sums over H where PyTorch sums over I, and in float32 its error is sqrt(H / I) of PyTorch's. Saved: the layer's x (not
a copy for each choice), u (h is computed again), S of both projections, the routing. Every step is deterministic: rows
of a token and of an expert are added up in their order, never by atomics. Weights and biases get a gradient only if
they ask for one.

Sources: Shazeer et al., "Outrageously Large Neural Networks" (2017); Tan et al., "Scattered Mixture-of-Experts
Implementation" (2024) for products that gather and combine.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _backend, _check
from .._library import register_op
from .._mask import threshold
from ..reference.experts import ExpertLinear, ExpertRouting, experts_of_rows
from ..reference.experts_grouped import grouped_matmul, laid_out_as
from ..reference.routing import Routing
from . import experts_arguments as arguments
from .experts_arguments import REASONS, facts

__all__ = ["REASONS", "ExpertLinear", "experts", "facts"]


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
    ctx.save_for_backward(*_kept(ctx.needs, x, output[1]), weight, bias, lora_a, lora_b, weights, seeds, *tables)


def _kept(needs, x, s):
    """x and S, where the gradients that are asked for read them."""
    _, need_dw, _, need_da, need_db, need_dweights = needs
    absent = x.new_empty(0)
    return x if need_dw or need_da or need_dweights else absent, s if need_db or need_dweights else absent


def _backward(ctx, grads, _):
    x, s, weight, bias, lora_a, lora_b, weights, seeds, *tables = ctx.saved_tensors
    found = _expert_linear_backward(
        grads[0], x, s, weight, bias, lora_a, lora_b, weights, seeds, tables, ctx.needs, *ctx.settings
    )
    return *(grad if need else None for grad, need in zip(found, ctx.needs, strict=True)), None, [None] * 5, *[None] * 5


def _no_second_gradients(ctx, grads):
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


def _of_rows(weights: Tensor, places: Tensor) -> Tensor:
    """The router's weight of each row: ``[M, 1]``."""
    rows = weights.new_empty(places.numel())
    return rows.index_copy_(0, places.reshape(-1).long(), weights.reshape(-1))[:, None]


_OPERANDS = "Tensor weight, Tensor bias, Tensor lora_a, Tensor lora_b, Tensor weights, Tensor seeds, Tensor[] tables, "
_SETTINGS = "float scale, float dropout, int tile, bool up, str backend"
_expert_linear_backward = register_op(
    "expert_linear_backward",
    f"(Tensor dy, Tensor x, Tensor s, {_OPERANDS}bool[] needs, {_SETTINGS}) -> Tensor[]",
    _backward_implementation,
    _backward_fake,
)
_expert_linear = register_op(
    "expert_linear",
    f"(Tensor x, {_OPERANDS}{_SETTINGS}) -> (Tensor[], Tensor)",
    _implementation,
    _fake,
    _setup_context,
    _backward,
    _no_second_gradients,
)


class _OfActivation(torch.autograd.Function):
    """``_expert_linear`` of ``activation(u)``, which keeps u and computes ``activation(u)`` again."""

    @staticmethod
    def forward(ctx, activation, u, h, weight, bias, lora_a, lora_b, weights, seeds, tables, settings):
        (y,), s = _expert_linear(h, weight, bias, lora_a, lora_b, weights, seeds, tables, *settings)
        ctx.activation, ctx.settings = activation, settings
        ctx.needs = [t.requires_grad for t in (u, weight, bias, lora_a, lora_b, weights)]
        _, s = _kept(ctx.needs, u, s)
        ctx.save_for_backward(u, s, weight, bias, lora_a, lora_b, weights, seeds, *tables)
        ctx.autocast = u.device.type, torch.get_autocast_dtype(u.device.type), torch.is_autocast_enabled(u.device.type)
        return y

    @staticmethod
    def backward(ctx, dy):
        if torch.is_grad_enabled():  # create_graph=True
            _no_second_gradients(ctx, dy)
        u, s, weight, bias, lora_a, lora_b, weights, seeds, *tables = ctx.saved_tensors
        with torch.enable_grad(), torch.autocast(*ctx.autocast):
            u = u.detach().requires_grad_()
            h = ctx.activation(u).to(weight.dtype)
        operands = s, weight, bias, lora_a, lora_b, weights, seeds, tables
        dh, *found = _expert_linear_backward(dy, h.detach(), *operands, ctx.needs, *ctx.settings)
        du = torch.autograd.grad(h, u, dh) if ctx.needs[0] else (None,)
        found = (grad if need else None for grad, need in zip(found, ctx.needs[1:], strict=True))
        return None, *du, None, *found, None, None, None


def experts(
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    up: ExpertLinear,
    down: ExpertLinear,
    activation: Callable[[Tensor], Tensor],
    seeds: Tensor | None = None,
    backend: str | None = None,
    *,
    tile: int | None = None,
) -> Tensor:
    """``y[t] = Σ_j w[t, j] · down_e(activation(up_e(x[t])))`` with ``e = top_k_index[t, j]``.

    Each projection is ``x W_eᵀ + bias_e + scale · (drop(x) A_eᵀ) B_eᵀ``, with or without an adapter.

    Args:
        x: ``[T, H]``, float16, bfloat16, float32 or float64.
        top_k_index: int32 or int64 ``[T, k]``, each token's experts; an index outside 0 ... E - 1 is no expert, and
            gives 0 (the sentinel of expert parallelism).
        top_k_weights: ``[T, k]``, any floating-point dtype.
        up: an ``ExpertLinear``: weight ``[E, N, H]``, bias ``[E, N]``, lora_a ``[E, R, H]``, lora_b ``[E, N, R]``,
            scale, dropout. The weights of up and down have one dtype, in which the frozen products are computed;
            adapters have the same, or are float32. Any strides.
        down: the same for the second projection, weight ``[E, H, K]``.
        activation: ``[n, N of up]`` to ``[n, K of down]``, row by row and without randomness; it is called again in
            backward. For gated experts it is the gate: ``lambda u: silu(u[:, :I]) * u[:, I:]``.
        seeds: int64 ``[2, E]`` of the dropout masks of up and down, None: drawn from torch's generator. A mask's rows
            count the expert's own tokens in the order of the batch.
        backend: "triton", "reference", or None for ``FASTPEFT_BACKEND`` and then the automatic choice.
        tile: rows a tile has, as in ``route``.

    Returns:
        ``[T, H]`` in x's dtype, summed in float32 or wider. Differentiable in x, top_k_weights and all tensors of up
        and down.

    Raises:
        TypeError, ValueError: naming the argument, what it is and what was expected.
    """
    arguments.tokens(x, top_k_index, top_k_weights)
    if not callable(activation):
        raise TypeError(f"experts: activation is {_check.shown(activation)}, expected a function of a tensor")
    up = arguments.projection("up", up, x, {"K": x.shape[1]})
    down = arguments.projection("down", down, x, {"E": len(up.weight), "N": x.shape[1]}, up.weight.dtype)
    backend = arguments.backend(backend, x, up, down)
    dropout = max(up.dropout, down.dropout)
    seeds = arguments.seeds(seeds, len(up.weight), bool(threshold(dropout)), x)
    tile = arguments.default_tile(up.weight.dtype, dropout) if tile is None else tile
    routing = arguments.routing(top_k_index, len(up.weight), tile, backend)
    (u,), _ = _expert_linear(*_operands(x.to(up.weight.dtype), up, x.new_empty(0), seeds[0], routing), True, backend)
    plain = not torch.compiler.is_compiling() and type(u) is Tensor
    h = activation(u.detach()) if plain else None
    if h is not None and not h.requires_grad:
        _check_activation(h, u, down)
        operands = _operands(h.to(down.weight.dtype), down, top_k_weights, seeds[1], routing)
        y = _OfActivation.apply(activation, u, *operands[:8], (*operands[8:], False, backend))
    else:  # compiled, or the activation trains parameters of its own, which rows without an expert must not reach
        used = (routing.rows.order < routing.rows.starts[-1])[:, None]
        h = activation(torch.where(used, u, 0))
        _check_activation(h, u, down)
        h = torch.where(used, h, 0).to(down.weight.dtype)
        (y,), _ = _expert_linear(*_operands(h, down, top_k_weights, seeds[1], routing), False, backend)
    return y.to(x.dtype)


def _check_activation(h: Tensor, u: Tensor, down: ExpertLinear) -> None:
    if h.shape != (u.shape[0], down.weight.shape[2]):
        expected = [u.shape[0], down.weight.shape[2]]
        raise ValueError(f"experts: activation returns shape {list(h.shape)}, expected {expected}")


def _operands(x: Tensor, linear: ExpertLinear, weights: Tensor, seeds: Tensor, routing: ExpertRouting) -> tuple:
    """The ops' arguments up to ``up`` and ``backend``: what is absent is empty."""
    weight, bias, lora_a, lora_b, scale, dropout = linear
    absent = x.new_empty(0)
    optional = (absent if tensor is None else tensor for tensor in (bias, lora_a, lora_b))
    tables = [routing.tokens, routing.places, *routing.rows[:3]]
    return x, weight, *optional, weights, seeds, tables, scale, dropout, routing.rows.tile
