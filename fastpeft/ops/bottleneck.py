"""A bottleneck adapter, fused.

    a = norm(x)    z = a Dᵀ + d    h = act(z)    y = residual + mask ∘ (s · (h Uᵀ + b)) / (1 - p)

    g  = mask ∘ dy / (1 - p)                     the mask is drawn again from the seed
    dz = (s · g) U ∘ act'(z)                     dU = s · gᵀ h,   db = s · Σ g,   ds = Σ_h (gᵀ h) ∘ U + b ∘ Σ g
    dx = norm'(dz D) (+ dy: the residual is x)   dD = dzᵀ a,      dd = Σ dz,      dresidual = dy

x ``[M, K]``, D ``[H, K]``, U ``[N, H]``. A learned scale s multiplies U and b, so its gradient comes from theirs and
nothing of y's size is computed for it. Saved for backward: x, and what the backend keeps beside it: the kernels two
numbers a row (mean and reciprocal deviation) where there is a norm, and compute h again; on the CPU z ``[M, H]``.
Neither a, nor s · u, nor the mask, nor the residual.

With ``slots`` every row has the adapter of its slot, as tensors ``[S, ...]``; a row with slot -1 is its residual.

Every step is deterministic: sums over rows go through partial results added in a fixed order, never atomics.
Sources: Houlsby et al., "Parameter-Efficient Transfer Learning for NLP" (2019); Pfeiffer et al., "AdapterFusion"
(2021); He et al., "Towards a Unified View of Parameter-Efficient Transfer Learning" (2022): parallel and scaled forms.
"""

import torch
from torch import Tensor

from .. import _backend, _check, reference
from .._library import autocast_dtype, cast, register_op
from .._plan import planned
from ..reference import Routing
from ..reference.bottleneck_terms import Settings, Weights
from . import bottleneck_arguments as arguments
from .routing import check_slots, routed, slots_of

MAX_WIDTH = 4096


def _implementation(x, *operands):
    weights, residual, seed, routing, settings, backend = _unpack(operands)
    y, kept = _backend.load("bottleneck", backend).forward(x, weights, residual, settings, seed, routing)
    return [y], kept


def _fake(x, *operands):
    weights, residual, _, _, settings, backend = _unpack(operands)
    kept = _backend.load("bottleneck", backend).empty_kept(x, weights, settings)
    dtype = x.dtype if residual is None else residual.dtype
    return [x.new_empty(x.shape[0], weights.up.shape[-2], dtype=dtype)], kept


def _setup_context(ctx, inputs, output):
    x, *operands = inputs
    weights, residual, _, _, _, backend = _unpack(operands)
    ctx.needs = [t is not None and t.requires_grad for t in (x, *weights)]
    ctx.need_residual = residual is not None and residual.requires_grad
    saved = x
    if not _backend.load("bottleneck", backend).needs_x(ctx.needs, weights.norm_weight is not None):
        saved = x.new_empty(0, x.shape[1])
    seed, order, starts, tiles, *ctx.settings = operands[8:]
    ctx.save_for_backward(saved, output[1] if any(ctx.needs) else None, *weights, seed, order, starts, tiles)


def _backward(ctx, grads, _):
    x, kept, *operands = ctx.saved_tensors
    (dy,) = grads
    found = [None] * len(ctx.needs)
    if any(ctx.needs):
        found = _bottleneck_backward(dy, x, kept, *operands[:7], None, *operands[7:], *ctx.settings, ctx.needs)
        found = [grad if need else None for grad, need in zip(found, ctx.needs, strict=True)]
    return *found, dy if ctx.need_residual else None, *[None] * (4 + len(ctx.settings))


def _definition(ctx, grads):
    x, _, *rest = ctx.saved_tensors
    weights, seed, routing = Weights._make(rest[:7]), rest[7], rest[8:]
    activation, number, norm, eps, dropout, own, _, _ = ctx.settings
    (dy,) = grads
    if x.shape[0] != dy.shape[0]:
        if any(ctx.needs):
            reason = "with a frozen down projection, expected one that is trained: x is not kept"
            raise RuntimeError(f"bottleneck: create_graph=True {reason}")
        x = x.new_zeros(dy.shape[0], x.shape[1])  # the residual's gradient depends on nothing
    residual = None if own else dy.new_zeros(dy.shape, requires_grad=ctx.need_residual)
    slots = None if routing[0] is None else slots_of(*routing[:2])

    def outputs(x, down, down_bias, up, up_bias, scales, norm_weight, norm_bias, residual, *_):
        scale = number if scales is None else scales
        settings = activation, scale, norm_weight, norm_bias, norm, eps, dropout, seed, slots
        return [reference.bottleneck(x, down, down_bias, up, up_bias, x if own else residual, *settings)]

    return (x, *weights, residual, *[None] * (4 + len(ctx.settings))), outputs


def _backward_implementation(dy, x, kept, *rest):
    """The gradients of x and of every weight; what is not needed is an empty tensor."""
    *operands, needs = rest
    weights, _, seed, routing, settings, backend = _unpack(operands)
    found = _backend.load("bottleneck", backend).backward(dy, x, kept, weights, settings, seed, routing, needs)
    return [dy.new_empty(0) if grad is None else grad for grad in found]


def _backward_fake(dy, x, kept, *rest):
    *operands, needs = rest
    weights = operands[:7]
    dx = dy.new_empty(dy.shape[0], x.shape[1], dtype=x.dtype)
    found = [dx, *(None if t is None else dy.new_empty(t.shape, dtype=t.dtype) for t in weights)]
    return [grad if need else dy.new_empty(0) for grad, need in zip(found, needs, strict=True)]


def _unpack(operands):
    weights, settings = Weights._make(operands[:7]), Settings._make(operands[12:18])
    residual, seed, order, starts, tiles = operands[7:12]
    routing = None if order is None else Routing(order, starts, tiles, weights.down.shape[0], operands[18])
    return weights, residual, seed, routing, settings, operands[19]


_OPERANDS = (
    "Tensor down, Tensor? down_bias, Tensor up, Tensor? up_bias, Tensor? scales, Tensor? norm_weight, "
    "Tensor? norm_bias, Tensor? residual, Tensor? seed, Tensor? order, Tensor? starts, Tensor? tiles, "
    "str activation, float scale, str norm, float eps, float dropout, bool own, int tile, str backend"
)
_bottleneck_backward = register_op(
    "bottleneck_backward",
    f"(Tensor dy, Tensor x, Tensor kept, {_OPERANDS}, bool[] needs) -> Tensor[]",
    _backward_implementation,
    _backward_fake,
)
_bottleneck = register_op(
    "bottleneck",
    f"(Tensor x, {_OPERANDS}) -> (Tensor[], Tensor)",
    _implementation,
    _fake,
    _setup_context,
    _backward,
    _definition,
)


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
    seed: int | Tensor | None = None,
    slots: Tensor | Routing | None = None,
    backend: str | None = None,
) -> Tensor:
    """``y = residual + drop(scale · (act(norm(x) Dᵀ + d) Uᵀ + b))``, a bottleneck adapter (Houlsby et al., 2019).

    Args:
        x: the input ``[..., K]``, float16, bfloat16, float32 or float64, any strides.
        down_weight: D ``[H, K]``, any H from 1. All weights have one dtype: x's, or float32, in which the branch is
            then computed.
        down_bias: d ``[H]``, or None for none.
        up_weight: U ``[N, H]``.
        up_bias: b ``[N]``, or None for none.
        residual: what the branch is added to, ``[..., N]`` in x's dtype or float32. None: nothing is added. The
            sequential adapter passes x itself, which is recognised: dx then takes in dy on the way.
        activation: "relu", "gelu" (erf), "gelu_tanh", "silu", "tanh", "leaky_relu" (slope 0.01) or "identity".
        scale: a number, or a learned tensor ``[1]`` or ``[N]`` in the weights' dtype.
        norm_weight: ``[K]``, for a norm of x before the projection; None: no norm.
        norm_bias: ``[K]``, or None for none; it needs a norm_weight.
        norm: "layer" or "rms", where there is a norm_weight.
        eps: added to the variance or the mean square, at least 0.
        dropout: probability of dropping an element of the branch after the up projection, in [0, 1), rounded to 2**-16.
        seed: of the dropout mask (see ``fastpeft.reference.keep_mask``): a 64-bit integer, an int64 tensor of one
            element on x's device, or None to draw one from torch's generator. With ``slots`` also int64 ``[S]``.
        slots: int32 or int64 of x's leading shape, or what ``route`` made of it: the rows' adapters, -1 for none. Every
            weight (and a scale that is a tensor) then has a leading dimension S. A row without an adapter is its
            residual, or 0. A mask's rows count the slot's own rows, so an adapter draws in any batch what it draws
            alone.
        backend: "cuda", "triton" or "reference", which then serves the call, or raises with the reason why it cannot.
            None takes the environment's ``FASTPEFT_BACKEND``, and without one the first of the three that can serve.

    Returns:
        ``[..., N]`` in the residual's dtype, or x's. Differentiable in x, the residual, every weight and the scale.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value, or the backend asked for cannot serve the call.
            Every message names the op, the argument, what it is and what was expected.
    """
    _check.floating("bottleneck", "x", x)
    own, learned = residual is x, scale if isinstance(scale, Tensor) else None
    weights = Weights(down_weight, down_bias, up_weight, up_bias, learned, norm_weight, norm_bias)
    wanted = autocast_dtype(x)
    if wanted is not None:
        own, x = own and x.dtype == wanted, x.to(wanted)
        weights = Weights._make(cast(t, wanted, torch.float32) for t in weights)
    number = 1.0 if isinstance(scale, Tensor) else _check.finite("bottleneck", "scale", scale)
    settings = activation, norm, eps, number, dropout, seed, backend
    return _planned(x, weights, residual, own, slots, *settings)[0]


@planned
def _planned(x, weights, residual, own, slots, activation, norm, eps, number, dropout, seed, backend):
    rows = x.numel() // max(x.shape[-1], 1)
    if slots is not None:
        check_slots("bottleneck", "slots", slots, rows)
    sizes = arguments.weights(x, weights, slots is not None)
    if residual is not None:
        arguments.residual(residual, x, sizes)
    eps = arguments.settings(activation, norm, eps)
    dropout = _check.probability("bottleneck", "dropout", dropout)
    backend = _backend.choose("bottleneck", backend, REASONS, x, weights.down)
    order = starts = tiles = None
    tile = 0
    if slots is not None:
        order, starts, tiles, _, tile = routed("bottleneck", "slots", slots, sizes["S"], rows, x, backend)
    seed = arguments.seed(seed, dropout, sizes.get("S"), x.device)
    shape = x.shape
    if len(shape) != 2:
        x = x.reshape(-1, shape[-1])
        residual = residual if residual is None or own else residual.reshape(-1, sizes["N"])
    settings = activation, number, norm, eps, dropout, own, tile, backend
    (y,), _ = _bottleneck(x, *weights, None if own else residual, seed, order, starts, tiles, *settings)
    return [y if len(shape) == 2 else y.view(*shape[:-1], sizes["N"])]


def _triton_reason(x, down):
    reason = _backend.triton_lora_reason(x, down.dtype, 0, 0)
    return f"width {down.shape[-2]} > {MAX_WIDTH}" if reason is None and down.shape[-2] > MAX_WIDTH else reason


REASONS = {
    "cuda": lambda x, down: _backend.cuda_missing() or "fastpeft._C has no bottleneck",
    "triton": _triton_reason,
    "reference": lambda x, down: None,
}


def facts(given: dict) -> tuple:
    """What ``REASONS`` look at, of the arguments of ``bottleneck`` by name."""
    return given["x"], given["down_weight"]
