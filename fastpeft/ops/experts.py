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

import torch
from torch import Tensor

from .. import _check
from .._mask import threshold
from .._plan import planned
from ..reference.experts import ExpertLinear
from . import experts_arguments as arguments
from . import experts_registered as registered
from .experts_arguments import REASONS, facts

__all__ = ["REASONS", "ExpertLinear", "experts", "facts"]


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
    if not callable(activation):
        raise TypeError(f"experts: activation is {_check.shown(activation)}, expected a function of a tensor")
    up, down = arguments.numbers("up", up), arguments.numbers("down", down)
    with torch.no_grad():
        tables = _routed(x, top_k_index, top_k_weights, up, down, tile, backend)
    backend = arguments.backend(backend, x, up, down)
    tile = arguments.tile(tile, up, down, top_k_index)
    seeds = arguments.seeds(seeds, len(up.weight), bool(threshold(max(up.dropout, down.dropout))), x)
    of_up, of_down = (None, None) if seeds is None else seeds
    (u,) = _up(x.to(up.weight.dtype), up, of_up, tables, tile, backend)
    plain = not torch.compiler.is_compiling() and type(u) is Tensor
    h = activation(u.detach()) if plain else None
    if h is not None and not h.requires_grad:
        _check_activation(h, u, down)
        h = h.to(down.weight.dtype)
        y = _OfActivation.apply(activation, u, h, *down[:4], top_k_weights, of_down, tables, (*down[4:], tile, backend))
    else:  # compiled, or the activation trains parameters of its own, which rows without an expert must not reach
        _, _, order, starts, _ = tables
        used = (order < starts[-1])[:, None]
        h = activation(torch.where(used, u, 0))
        _check_activation(h, u, down)
        h = torch.where(used, h, 0).to(down.weight.dtype)
        operands = _operands(h, down, top_k_weights, of_down, tables, tile)
        (y,), _ = registered.expert_linear(*operands, False, backend)
    return y.to(x.dtype)


def _check_activation(h: Tensor, u: Tensor, down: ExpertLinear) -> None:
    if h.shape != (u.shape[0], down.weight.shape[2]):
        expected = [u.shape[0], down.weight.shape[2]]
        raise ValueError(f"experts: activation returns shape {list(h.shape)}, expected {expected}")


@planned
def _routed(x, top_k_index, top_k_weights, up, down, tile, backend):
    """Check every tensor and sort the rows: tokens, places, and the routing's order, starts and tiles."""
    arguments.tokens(x, top_k_index, top_k_weights)
    arguments.projection("up", up, x, {"K": x.shape[1]})
    arguments.projection("down", down, x, {"E": len(up.weight), "N": x.shape[1]}, up.weight.dtype)
    backend = arguments.backend(backend, x, up, down)
    tile = arguments.tile(tile, up, down, top_k_index)
    tokens, places, rows = arguments.routing(top_k_index, len(up.weight), tile, backend)
    return [tokens, places, *rows[:3]]


@planned
def _up(x, linear, seeds, tables, tile, backend):
    (u,), _ = registered.expert_linear(*_operands(x, linear, None, seeds, tables, tile), True, backend)
    return [u]


@planned
def _down(h, linear, weights, seeds, tables, tile, backend):
    """y, and S where there is an adapter; without gradients."""
    (y,), s = registered.expert_linear(*_operands(h, linear, weights, seeds, tables, tile), False, backend)
    return [y] if linear.lora_a is None else [y, s]


@planned
def _gradients(dy, h, s, linear, weights, seeds, tables, needs, tile, backend):
    """Of ``_down``, those that are needed."""
    h, *operands = _operands(h, linear, weights, seeds, tables, tile)
    s = h.new_empty(0) if s is None else s
    *operands, scale, dropout, tile = operands
    found = registered.expert_linear_backward(dy, h, s, *operands, needs, scale, dropout, tile, False, backend)
    return [grad for grad, need in zip(found, needs, strict=True) if need]


def _operands(x, linear, weights, seeds, tables, tile) -> tuple:
    """The ops' arguments up to ``up`` and ``backend``: what is absent is empty."""
    weight, bias, lora_a, lora_b, scale, dropout = linear
    absent = x.new_empty(0)
    optional = (absent if tensor is None else tensor for tensor in (bias, lora_a, lora_b, weights))
    seeds = absent.new_empty(0, dtype=torch.int64) if seeds is None else seeds
    return x, weight, *optional, seeds, list(tables), scale, dropout, tile


class _OfActivation(torch.autograd.Function):
    """``_down`` of ``activation(u)``, which keeps u and computes ``activation(u)`` again."""

    @staticmethod
    def forward(ctx, activation, u, h, weight, bias, lora_a, lora_b, weights, seeds, tables, settings):
        linear = ExpertLinear(weight, bias, lora_a, lora_b, *settings[:2])
        y, *s = _down(h, linear, weights, seeds, tables, *settings[2:])
        ctx.activation, ctx.settings = activation, settings
        trained = u, weight, bias, lora_a, lora_b, weights
        ctx.needs = [t is not None and t.requires_grad for t in trained]
        _, s = registered.kept(ctx.needs, u, s[0]) if s else (u, None)
        ctx.save_for_backward(u, s, weight, bias, lora_a, lora_b, weights, seeds, *tables)
        ctx.autocast = u.device.type, torch.get_autocast_dtype(u.device.type), torch.is_autocast_enabled(u.device.type)
        return y

    @staticmethod
    def backward(ctx, dy):
        if torch.is_grad_enabled():  # create_graph=True
            registered.no_second_gradients(ctx, dy)
        u, s, weight, bias, lora_a, lora_b, weights, seeds, *tables = ctx.saved_tensors
        with torch.enable_grad(), torch.autocast(*ctx.autocast):
            u = u.detach().requires_grad_()
            h = ctx.activation(u).to(weight.dtype)
        scale, dropout, tile, backend = ctx.settings
        linear = ExpertLinear(weight, bias, lora_a, lora_b, scale, dropout)
        given = iter(_gradients(dy, h.detach(), s, linear, weights, seeds, tables, ctx.needs, tile, backend))
        dh, *found = (next(given) if need else None for need in ctx.needs)
        du = None if dh is None else torch.autograd.grad(h, u, dh)[0]
        return None, du, None, *found, None, None, None
