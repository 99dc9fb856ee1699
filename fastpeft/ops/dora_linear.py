"""DoRA around a frozen linear layer, fused: LoRA whose rows are given trained norms.

    n = ‖W + scale · B A‖, g = m / n, C = g ∘ B         n: a constant to every gradient, made without forming the sum
    S = scale · drop(x) Aᵀ, u = drop(x) Wᵀ              saved for backward: x, S and u
    y = g ∘ u + S Cᵀ + bias                              without dropout
    y = x Wᵀ + (g - 1) ∘ u + S Cᵀ + bias                 with dropout
    dS = scale · dY C, dC = dYᵀ S                        dB = g ∘ dC
    dm = (Σ dY ∘ u + Σ_r B ∘ dC) / n                     the magnitude's
    dX = (g ∘ dY) W + dS A                               without dropout
    dX = dY W + mask ∘ (((g - 1) ∘ dY) W + dS A) / (1 - p)
    dA = dSᵀ drop(x)

u is kept where the magnitude is trained: making it again would be a third product with W, half as much time again; y
cannot stand for it, since whoever is given y may overwrite it. With dropout the base acts on x and on drop(x), as in
PEFT, so there are two products with W each way; W is written out once for both where it is quantised. The low-rank term
is multiplied with g in float32 adapters' own dtype. Deterministic.

Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation" (2024).
"""

from typing import Any

import torch
from torch import Tensor

from .. import _backend, _check, reference
from .._library import autocast_dtype, cast, register_op
from .._mask import inverse_keep, threshold
from .._plan import planned
from . import dora_linear_arguments as arguments
from .base import Base, Written, parts, shapes
from .dora_linear_arguments import REASONS, facts
from .dora_linear_norm import row_norms

__all__ = ["REASONS", "dora_linear", "dora_norm", "facts"]


def _implementation(
    x, weight, tables, lora_a, lora_b, magnitude, bias, norm, scale, dropout, seeds, layouts, keeps, backend
):
    impl, linear = _backend.load("dora_linear", backend), _backend.load("lora_linear", backend)
    dense = _dense(x, weight, tables, layouts, backend)
    norm = norm.clone() if norm.numel() else row_norms(dense, lora_a, lora_b, scale, backend)
    gain = magnitude.to(norm.dtype).div(norm)
    s = linear.down(x, [lora_a], [scale], [dropout], seeds)
    low_rank = s, scaled_rows(lora_b, gain), bias if bias.numel() else None
    if threshold(dropout):
        dropped = impl.masked(x, dropout, seeds)
        u = x.new_empty(x.shape[0], lora_b.shape[0]).addmm_(dropped, dense.T, beta=0, alpha=inverse_keep(dropout))
        del dropped
        y = impl.combined(*low_rank, u, gain - 1, x @ dense.T)
    else:
        u = x @ dense.T
        y = impl.combined(*low_rank, u, gain)
    return [y], [s, u if keeps else x.new_empty(0), gain, norm]


def _fake(x, weight, tables, lora_a, lora_b, magnitude, bias, norm, scale, dropout, seeds, layouts, keeps, backend):
    rows, n = x.shape[0], lora_b.shape[0]
    sums = torch.promote_types(lora_a.dtype, torch.float32)
    s = x.new_empty(rows, lora_a.shape[0], dtype=lora_a.dtype)
    u = x.new_empty(rows, n) if keeps else x.new_empty(0)
    return [x.new_empty(rows, n)], [s, u, x.new_empty(n, dtype=sums), x.new_empty(n, dtype=sums)]


def _setup_context(ctx, inputs, output):
    x, weight, tables, lora_a, lora_b, magnitude, bias, _, scale, dropout, seeds, layouts, _, backend = inputs
    s, u, gain, norm = output[1]
    ctx.needs = [t.requires_grad for t in (x, lora_a, lora_b, magnitude, bias)]
    _, need_da, need_db, need_dm, _ = ctx.needs
    absent = x.new_empty(0)
    kept = x if need_da else absent, s if need_db or need_dm else absent, u
    ctx.save_for_backward(*kept, gain, norm, weight, lora_a, lora_b, magnitude, seeds, *tables)
    ctx.settings = scale, dropout, layouts, backend


def _backward(ctx, grads, _):
    if grads[0] is None:
        return (None,) * 14
    x, s, u, gain, norm, weight, lora_a, lora_b, magnitude, seeds, *tables = ctx.saved_tensors
    scale, dropout, *settings = ctx.settings
    operands = weight, tables, lora_a, lora_b, magnitude, scale, dropout, seeds, ctx.needs, *settings
    found = _dora_linear_backward(grads[0], x, s, u, gain, norm, *operands)
    dx, da, db, dm, dbias = (grad if need else None for grad, need in zip(found, ctx.needs, strict=True))
    return dx, None, [None] * len(tables), da, db, dm, dbias, *_rest(settings[0])


def _rest(layouts):
    """The gradients behind the tensors'; torch.library takes a list without items for one of tensors."""
    return None, None, None, None, None if layouts else [], None, None


def _definition(ctx, grads):
    x, _, _, _, norm, weight, lora_a, lora_b, magnitude, seeds, *tables = ctx.saved_tensors
    scale, dropout, layouts, backend = ctx.settings
    need_dx, _, need_db, need_dm, need_dbias = ctx.needs
    if x.dim() == 1:  # not kept: then the gradients of B and of the magnitude alone depend on it
        if need_db or need_dm:
            raise RuntimeError(
                "dora_linear: create_graph=True with a frozen lora_a, expected a trained one: x is not kept"
            )
        x = x.new_zeros(grads[0].shape[0], lora_a.shape[1], requires_grad=need_dx)
    bias = lora_b.new_zeros(lora_b.shape[0], requires_grad=need_dbias)
    if layouts:
        (weight,) = Written(x, [weight], tables, layouts, backend).apart()

    def outputs(x, _, __, lora_a, lora_b, magnitude, bias, *___):
        operands = x, weight, lora_a, lora_b, magnitude, bias
        return [reference.dora_linear(*operands, scale, dropout, seeds if seeds.numel() else None, norm)]

    return (x, None, [None] * len(tables), lora_a, lora_b, magnitude, bias, *_rest(layouts)), outputs


def _backward_implementation(
    dy, x, s, u, gain, norm, weight, tables, lora_a, lora_b, magnitude, scale, dropout, seeds, needs, layouts, backend
):
    """``[dX, dA, dB, dm, dbias]``; what is not needed is an empty tensor."""
    impl, linear = _backend.load("dora_linear", backend), _backend.load("lora_linear", backend)
    need_dx, need_da, need_db, need_dm, need_dbias = needs
    found: Any = None, None, None
    if need_dx or need_da or need_db or need_dm:
        operands = [dy.new_empty(0)], [lora_a], [scaled_rows(lora_b, gain)], [scale], [dropout], seeds
        found = linear.backward([dy], x, s, *operands, need_dx, need_da, need_db or need_dm)
    dx, das, dcs = found
    dc = dcs[0] if dcs else dy
    dm = None
    if need_dx:
        dense = _dense(dy, weight, tables, layouts, backend)
        if threshold(dropout):
            q = dy.new_empty(dx.shape).addmm_(impl.scaled(dy, gain - 1), dense, beta=0, alpha=inverse_keep(dropout))
            impl.add_masked_(dx, q, dropout, seeds)
            dx.addmm_(dy, dense)
        else:
            dx.addmm_(impl.scaled(dy, gain), dense)
    if need_dm:
        through_b = (dc.to(gain.dtype) * lora_b).sum(1)
        dm = impl.gain_gradient(dy, u, gain.dtype).add_(through_b).div_(norm).to(magnitude.dtype)
    db = scaled_rows(dc, gain) if need_db else None
    dbias = dy.sum(0, dtype=lora_b.dtype) if need_dbias else None
    return [dy.new_empty(0) if grad is None else grad for grad in (dx, das and das[0], db, dm, dbias)]


def _backward_fake(
    dy, x, s, u, gain, norm, weight, tables, lora_a, lora_b, magnitude, scale, dropout, seeds, needs, layouts, backend
):
    sizes = (dy.shape[0], lora_a.shape[1]), lora_a.shape, lora_b.shape, magnitude.shape, magnitude.shape
    dtypes = dy.dtype, lora_a.dtype, lora_b.dtype, magnitude.dtype, lora_b.dtype
    return [
        dy.new_empty(size if need else 0, dtype=dtype if need else dy.dtype)
        for size, dtype, need in zip(sizes, dtypes, needs, strict=True)
    ]


def _dense(like: Tensor, weight: Tensor, tables, layouts, backend: str) -> Tensor:
    """The weight, written out in the dtype of ``like`` where it is quantised; until another one is."""
    (dense,) = Written(like, [weight], tables, layouts, backend) if layouts else (weight,)
    return dense


def scaled_rows(matrix: Tensor, gain: Tensor) -> Tensor:
    """``g ∘ B``: a factor for each row, in the matrix's dtype."""
    return (matrix * gain[:, None]).to(matrix.dtype)


_OPERANDS = "Tensor weight, Tensor[] tables, Tensor lora_a, Tensor lora_b, Tensor magnitude, {} float scale, "
_OPERANDS += "float dropout, Tensor seeds, {} int[] layouts, {} str backend"
_KEPT = "Tensor x, Tensor s, Tensor u, Tensor gain, Tensor norm"
_dora_linear_backward = register_op(
    "dora_linear_backward",
    f"(Tensor dy, {_KEPT}, {_OPERANDS.format('', 'bool[] needs,', '')}) -> Tensor[]",
    _backward_implementation,
    _backward_fake,
)
_dora_linear = register_op(
    "dora_linear",
    f"(Tensor x, {_OPERANDS.format('Tensor bias, Tensor norm,', '', 'bool keeps,')}) -> (Tensor[], Tensor[])",
    _implementation,
    _fake,
    _setup_context,
    _backward,
    _definition,
)


def dora_linear(
    x: Tensor,
    weight: Tensor | Base,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor,
    bias: Tensor | None = None,
    scale: float = 1.0,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    norm: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``y = x Wᵀ + bias + (g - 1) ∘ (drop(x) Wᵀ) + g ∘ scale · (drop(x) Aᵀ) Bᵀ`` with ``g = magnitude / norm``.

    That is what PEFT's DoRA computes, and ``g ∘ (x (W + scale · B A)ᵀ) + bias`` without dropout (Liu et al., 2024).

    Args:
        x: the input ``[..., K]``, float16, bfloat16, float32 or float64, any strides.
        weight: W ``[N, K]`` in x's dtype, any strides, or a ``Base``, as in ``lora_linear``; frozen.
        lora_a: A ``[r, K]``, in x's dtype or float32, in which the low-rank branch is then computed.
        lora_b: B ``[N, r]`` in lora_a's dtype.
        magnitude: ``[N]`` in x's dtype or the adapter's, the norms that the rows of ``W + scale · B A`` are given.
        bias: ``[N]`` in x's dtype or the adapter's, or None for none. It is not scaled.
        scale: factor of B A, without a unit: ``alpha / r``, or ``alpha / sqrt(r)`` for rsLoRA.
        dropout: probability of dropping an element of x wherever the adapter acts, in [0, 1), rounded to 2**-16.
        seed: of the dropout mask, as in ``lora_linear``.
        norm: ``[N]`` in float32 (float64 beside float64 adapters), what ``dora_norm`` gives for these tensors; None has
            it computed. It is a constant to every gradient (section 4.3 of the paper).
        backend: "triton" or "reference", which then serves the call, or raises with the reason why it cannot. None
            takes the environment's ``FASTPEFT_BACKEND``, and without one the first that can serve.

    Returns:
        ``[..., N]`` in x's dtype. Under autocast x, weight and bias are cast to autocast's dtype first. Products with W
        are rounded to x's dtype, also that of dropped x, which PEFT computes in float32 beside float32 adapters; all
        else is computed in the adapters' dtype, and y rounded once. So with dropout the magnitude's gradient is as
        accurate as it is without.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value, the weight asks for a gradient, or the backend
            asked for cannot serve the call. Every message names the op, the argument, what it is and what was expected.
        RuntimeError: in a backward with ``create_graph=True`` where A is frozen, since x is then not kept.
    """
    _check.floating("dora_linear", "x", x)
    wanted = autocast_dtype(x)
    if wanted is not None:
        x, weight, bias = x.to(wanted), cast(weight, wanted), cast(bias, wanted)
        lora_a, lora_b, magnitude = (cast(t, wanted, torch.float32) for t in (lora_a, lora_b, magnitude))
    (weight,), tables, layouts = parts([weight])
    return _planned(x, weight, tables, lora_a, lora_b, magnitude, bias, norm, scale, dropout, seed, layouts, backend)[0]


@planned
def _planned(x, weight, tables, lora_a, lora_b, magnitude, bias, norm, scale, dropout, seed, layouts, backend):
    """All that is left to do once autocast has cast, which a plan stands for."""
    arguments.tensors(x, weight, shapes([weight], layouts)[0], lora_a, lora_b, magnitude, bias, norm)
    scale, dropout = arguments.numbers(scale, dropout)
    shape = x.shape
    flat = x if len(shape) == 2 else x.reshape(-1, shape[-1])
    backend = _backend.choose("dora_linear", backend, REASONS, flat, [lora_a], [weight])
    seeds = arguments.seeds(seed, dropout, x)
    absent, keeps = x.new_empty(0), torch.is_grad_enabled() and magnitude.requires_grad
    bias, norm = (absent if t is None else t for t in (bias, norm))
    operands = weight, tables, lora_a, lora_b, magnitude, bias, norm, scale, dropout, seeds, layouts, keeps
    (y,), _ = _dora_linear(flat, *operands, backend)
    return [y if len(shape) == 2 else y.reshape(*shape[:-1], y.shape[-1])]


@torch.no_grad()
def dora_norm(
    weight: Tensor | Base, lora_a: Tensor, lora_b: Tensor, scale: float = 1.0, backend: str | None = None
) -> Tensor:
    """``‖W + scale · B A‖`` of each row, without forming the sum; no gradient.

    Args:
        weight: W ``[N, K]``, or a ``Base``, which is written out in its own dtype, or the adapter's.
        lora_a: A ``[r, K]``, in W's dtype or float32.
        lora_b: B ``[N, r]`` in lora_a's dtype.
        scale: factor of B A.
        backend: as in ``dora_linear``.

    Returns:
        ``[N]`` in float32, or float64 for float64 adapters.

    Raises:
        ValueError: the backend asked for cannot serve the call.
    """
    (given,), tables, layouts = parts([weight])
    like = lora_a if layouts else given
    chosen = _backend.choose("dora_norm", backend, REASONS, like, [lora_a], [given])
    with torch.autocast(like.device.type, enabled=False):
        return row_norms(_dense(like, given, tables, layouts, chosen), lora_a, lora_b, scale, chosen)
