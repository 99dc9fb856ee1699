"""LoRA around frozen linear layers, fused.

    y = x Wᵀ + bias + S Bᵀ            S  = scale · drop(x) Aᵀ                          saved for backward: x and S
    dS = scale · dY B                 dB = dYᵀ S                                       one read of dY
    dX = mask ∘ (dS A) / (1 - p) + dY W
    dA = dSᵀ drop(x)                  the mask is drawn again from the seed            one read of x

A frozen W may be quantised (``fastpeft.ops.Base``): it is written out where the base GEMM reads it, again in backward,
and never kept.

The shared form does this for several projections of the same x (q, k and v; gate and up): their A's are stacked, x is
read once for all S and once for all dA, and their dX's add up in one buffer. The low-rank term is written first and the
base GEMM accumulates onto it (beta = 1), so y is rounded at the magnitude of the small term, not twice at its own. The
CUDA kernels of csrc/ take both products in one sum, and y is rounded once.

Every step is deterministic: sums over row blocks go through partial results added in a fixed order, never atomics.
Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _backend, _check, reference
from .._library import autocast_dtype, cast, register_op
from .._plan import planned
from . import lora_linear_arguments as arguments
from .base import Base, Written, parts, shapes
from .lora_linear_backends import MAX_RANK, REASONS, facts

__all__ = ["MAX_RANK", "REASONS", "facts", "lora_linear", "lora_linear_shared"]


def _implementation(x, weights, tables, lora_as, lora_bs, biases, scales, dropouts, seeds, layouts, backend):
    impl = _backend.load("lora_linear", backend)
    if layouts:
        weights = Written(x, weights, tables, layouts, backend)
    return impl.forward(x, weights, lora_as, lora_bs, biases, scales, dropouts, seeds)


def _fake(x, weights, tables, lora_as, lora_bs, biases, scales, dropouts, seeds, layouts, backend):
    ys = [x.new_empty(x.shape[0], b.shape[0]) for b in lora_bs]
    return ys, x.new_empty(x.shape[0], sum(a.shape[0] for a in lora_as), dtype=lora_as[0].dtype)


def _setup_context(ctx, inputs, output):
    x, weights, tables, lora_as, lora_bs, biases, scales, dropouts, seeds, layouts, backend = inputs
    ctx.needs = [x.requires_grad] + [any(t.requires_grad for t in ts) for ts in (weights, lora_as, lora_bs, biases)]
    _, need_dw, need_da, need_db, _ = ctx.needs
    absent = x.new_empty(0)
    saved_x = x if need_da or need_dw else absent
    saved_s = output[1] if need_db else absent
    ctx.save_for_backward(saved_x, saved_s, seeds, *weights, *lora_as, *lora_bs, *tables)
    ctx.settings = scales, dropouts, layouts, backend


def _saved(ctx):
    """What was saved, and of its lists each by itself; every projection has a scale."""
    x, s, seeds, *rest = ctx.saved_tensors
    count = len(ctx.settings[0])
    weights, lora_as, lora_bs = (rest[i * count : (i + 1) * count] for i in range(3))
    return x, s, seeds, weights, lora_as, lora_bs, rest[3 * count :]


def _backward(ctx, grads, _):
    x, s, seeds, weights, lora_as, lora_bs, tables = _saved(ctx)
    scales, dropouts, layouts, backend = ctx.settings
    rows = next(grad.shape[0] for grad in grads if grad is not None)
    dys = [x.new_zeros(rows, b.shape[0]) if dy is None else dy for dy, b in zip(grads, lora_bs, strict=True)]
    operands = weights, tables, lora_as, lora_bs, scales, dropouts, seeds, ctx.needs, layouts, backend
    dx, *flat = _lora_linear_backward(dys, x, s, *operands)
    count, none = len(scales), [None] * len(scales)
    dws, das, dbs, dbiases = (
        flat[i * count : (i + 1) * count] if need else none for i, need in enumerate(ctx.needs[1:])
    )
    dx = dx if ctx.needs[0] else None
    return dx, dws, [None] * len(tables), das, dbs, dbiases, *_rest(layouts)


def _rest(layouts):
    """The gradients behind the tensors'; torch.library takes a list without items for one of tensors."""
    return None, None, None, None if layouts else [], None


def _definition(ctx, grads):
    x, _, seeds, weights, lora_as, lora_bs, tables = _saved(ctx)
    scales, dropouts, layouts, backend = ctx.settings
    if x.dim() == 1:  # not kept: then the gradient of B alone depends on it
        if ctx.needs[3]:
            raise RuntimeError(
                "lora_linear: create_graph=True with a frozen lora_a, expected a trained one: x is not kept"
            )
        rows = next(grad.shape[0] for grad in grads if grad is not None)
        x = x.new_zeros(rows, lora_as[0].shape[1], requires_grad=ctx.needs[0])
    biases = [b.new_zeros(b.shape[0], requires_grad=ctx.needs[4]) for b in lora_bs]
    if layouts:
        weights = Written(x, weights, tables, layouts, backend).apart()

    def outputs(x, weights, _, lora_as, lora_bs, biases, *__):
        return [
            reference.lora_linear(x, weight if weight.numel() else None, a, b, bias, scale, dropout, seeds[p : p + 1])
            for p, (weight, a, b, bias, scale, dropout) in enumerate(
                zip(weights, lora_as, lora_bs, biases, scales, dropouts, strict=True)
            )
        ]

    return (x, weights, [None] * len(tables), lora_as, lora_bs, biases, *_rest(layouts)), outputs


def _backward_implementation(
    dys, x, s, weights, tables, lora_as, lora_bs, scales, dropouts, seeds, needs, layouts, backend
):
    """``[dX, *dW, *dA, *dB, *dbias]``; what is not needed is an empty tensor."""
    need_dx, need_dw, need_da, need_db, need_dbias = needs
    dx, das, dbs = None, None, None
    frozen = shapes(weights, layouts)
    if need_dx or need_da or need_db:
        written = Written(dys[0], weights, tables, layouts, backend) if layouts else weights
        impl, operands = _backend.load("lora_linear", backend), (written, lora_as, lora_bs, scales, dropouts, seeds)
        dx, das, dbs = impl.backward(dys, x, s, *operands, need_dx, need_da, need_db)
    absent = [None] * len(dys)
    grads = [
        dx,
        *(
            dy.T @ x if need_dw and weight.numel() and not quantised else None
            for dy, weight, quantised in zip(dys, weights, frozen, strict=True)
        ),
        *(das or absent),
        *(dbs or absent),
        *(dy.sum(0, dtype=b.dtype) if need_dbias else None for dy, b in zip(dys, lora_bs, strict=True)),
    ]
    return [x.new_empty(0) if grad is None else grad for grad in grads]


def _backward_fake(dys, x, s, weights, tables, lora_as, lora_bs, scales, dropouts, seeds, needs, layouts, backend):
    need_dx, need_dw, need_da, need_db, need_dbias = needs
    empty = x.new_empty
    return [
        empty(dys[0].shape[0], lora_as[0].shape[1]) if need_dx else empty(0),
        *(
            empty(w.shape) if need_dw and w.numel() and not quantised else empty(0)
            for w, quantised in zip(weights, shapes(weights, layouts), strict=True)
        ),
        *(torch.empty_like(a, memory_format=torch.contiguous_format) if need_da else empty(0) for a in lora_as),
        *(torch.empty_like(b, memory_format=torch.contiguous_format) if need_db else empty(0) for b in lora_bs),
        *(empty(b.shape[0], dtype=b.dtype) if need_dbias else empty(0) for b in lora_bs),
    ]


_OPERANDS = (
    "Tensor x, {} Tensor[] weights, Tensor[] tables, Tensor[] lora_as, Tensor[] lora_bs, {} "
    "float[] scales, float[] dropouts, Tensor seeds, {} int[] layouts, str backend"
)
_lora_linear_backward = register_op(
    "lora_linear_backward",
    f"(Tensor[] dys, {_OPERANDS.format('Tensor s,', '', 'bool[] needs,')}) -> Tensor[]",
    _backward_implementation,
    _backward_fake,
)
_lora_linear = register_op(
    "lora_linear",
    f"({_OPERANDS.format('', 'Tensor[] biases,', '')}) -> (Tensor[], Tensor)",
    _implementation,
    _fake,
    _setup_context,
    _backward,
    _definition,
)


def lora_linear(
    x: Tensor,
    weight: Tensor | Base,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None = None,
    scale: float = 1.0,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``y = x Wᵀ + bias + scale · (drop(x) Aᵀ) Bᵀ`` (Hu et al., 2021).

    Args:
        x: the input ``[..., K]``, float16, bfloat16, float32 or float64, any strides.
        weight: W ``[N, K]`` in x's dtype, any strides (a Conv1D passes ``weight.T``). It gets a gradient only if it
            asks. Or a frozen one in 4 or 8 bits, a ``Base``, which is written out in x's dtype whenever it is read.
        lora_a: A ``[r, K]``, in x's dtype or float32. In float32 the low-rank branch is computed in float32, and x is
            never copied to float32.
        lora_b: B ``[N, r]`` in lora_a's dtype.
        bias: ``[N]`` in x's dtype or the adapter's, or None for none.
        scale: factor of the low-rank term, without a unit: ``alpha / r``, or ``alpha / sqrt(r)`` for rsLoRA.
        dropout: probability of dropping an element of x in the low-rank branch, in [0, 1), rounded to 2**-16.
        seed: of the dropout mask (see ``fastpeft.reference.keep_mask``): a 64-bit integer, an int64 tensor of one
            element on x's device, or None to draw one from torch's generator for that device.
        backend: "cuda", "triton" or "reference", which then serves the call, or raises with the reason why it cannot.
            None takes the environment's ``FASTPEFT_BACKEND``, and without one the first of the three that can serve.

    Returns:
        ``[..., N]`` in x's dtype. Under autocast x, weight and bias are cast to autocast's dtype first.

        With 16-bit x and float32 adapters, the low-rank term is rounded to 16 bits before the base is added (in PEFT
        the base is, before the term): with rms t of the term and b of the base, y's rms error is
        sqrt((2 t² + b²) / (t² + 2 b²)) of PEFT's. Measured: 0.71 for small terms, 1.00 at t = b, 1.22 at t = 2 b.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value, or the backend asked for cannot serve the call.
            Every message names the op, the argument, what it is and what was expected.
    """
    given = [weight], [lora_a], [lora_b], [bias], [scale], [dropout], [seed]
    return _call("lora_linear", False, x, *given, backend)[0]


def lora_linear_shared(
    x: Tensor,
    weights: Sequence[Tensor | Base | None],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    scales: Sequence[float] | None = None,
    dropouts: Sequence[float] | None = None,
    seeds: Sequence[int | Tensor | None] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """``lora_linear`` for several projections of one x, which is read once for all of them.

    ``y_p = x W_pᵀ + bias_p + scale_p · (drop_p(x) A_pᵀ) B_pᵀ``. Each projection has its own N, rank, scale, dropout and
    mask; the adapters share one dtype. Every list has an item for each projection.

    Args:
        x: the input ``[..., K]``, as in ``lora_linear``.
        weights: W_p ``[N_p, K]`` or a ``Base``, as in ``lora_linear``; or None: y_p is then the low-rank term (and
            bias) alone, which is how several active adapters of one layer are added up.
        lora_as: A_p ``[r_p, K]``.
        lora_bs: B_p ``[N_p, r_p]``.
        biases: ``[N_p]`` or None; None for all: no biases.
        scales: factors of the low-rank terms; None for all: 1.
        dropouts: probabilities in [0, 1); None for all: 0.
        seeds: of the dropout masks, as in ``lora_linear``; None for all: each is drawn.
        backend: "cuda", "triton" or "reference", which then serves the call, or raises with the reason why it cannot.
            None takes the environment's ``FASTPEFT_BACKEND``, and without one the first of the three that can serve.

    Returns:
        One ``[..., N_p]`` in x's dtype for each projection.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value, or the backend asked for cannot serve the call.
            Every message names the op, the argument and its item, what it is and what was expected.
    """
    given = weights, lora_as, lora_bs, biases, scales, dropouts, seeds
    return tuple(_call("lora_linear_shared", True, x, *given, backend))


def _call(op, shared, x, weights, lora_as, lora_bs, biases, scales, dropouts, seeds, backend):
    """Casts as autocast wants it; the rest is planned."""
    wanted = autocast_dtype(x) if isinstance(x, Tensor) else None
    if wanted is not None:
        _check.floating(op, "x", x)
        if shared:
            lists = _lists(op, weights, lora_as, lora_bs, biases, scales, dropouts, seeds)
            lora_as, lora_bs, biases, scales, dropouts, seeds = lists
        x, weights, biases = x.to(wanted), [cast(t, wanted) for t in weights], [cast(t, wanted) for t in biases]
        lora_as, lora_bs = ([cast(t, wanted, torch.float32) for t in ts] for ts in (lora_as, lora_bs))
    return _planned(op, shared, x, weights, lora_as, lora_bs, biases, scales, dropouts, seeds, backend)


def _lists(op, weights, lora_as, lora_bs, biases, scales, dropouts, seeds):
    given = {"lora_as": lora_as, "lora_bs": lora_bs, "biases": biases}
    return arguments.lists(op, weights, {**given, "scales": scales, "dropouts": dropouts, "seeds": seeds})


@planned
def _planned(op, shared, x, weights, lora_as, lora_bs, biases, scales, dropouts, seeds, backend):
    """Check everything, then flatten x's leading dimensions once and restore them."""
    _check.floating(op, "x", x)
    lists = _lists(op, weights, lora_as, lora_bs, biases, scales, dropouts, seeds)
    lora_as, lora_bs, biases, scales, dropouts, seeds = lists
    weights, tables, layouts = parts(weights)
    quantised = shapes(weights, layouts)
    arguments.branches(op, shared, x, weights, quantised, lora_as, lora_bs, biases)
    scales, dropouts = arguments.numbers(op, shared, scales, dropouts)
    shape = x.shape
    flat = x if len(shape) == 2 else x.reshape(-1, shape[-1])
    backend = _backend.choose(op, backend, REASONS, flat, lora_as, weights, lora_bs)
    seeds = arguments.seeds(op, shared, seeds, dropouts, x)
    absent = x.new_empty(0)
    weights = [absent if weight is None else weight for weight in weights]
    biases = [absent if bias is None else bias for bias in biases]
    lora_as, lora_bs = list(lora_as), list(lora_bs)
    ys, _ = _lora_linear(flat, weights, tables, lora_as, lora_bs, biases, scales, dropouts, seeds, layouts, backend)
    return ys if len(shape) == 2 else [y.reshape(*shape[:-1], y.shape[-1]) for y in ys]
