"""LoRA for a batch whose tokens belong to different adapters, forward and backward.

    y[t] += S[t] B[s]ᵀ          S[t] = scale[s] · drop(x[t]) A[s]ᵀ     s = token_slots[t]     saved: x and S
    dS[t] = scale[s] · dY[t] B[s]             dB[s] = Σ dY[t]ᵀ S[t]
    dX[t] = mask ∘ (dS[t] A[s]) / (1 - p)     dA[s] = Σ dS[t]ᵀ drop(x[t])     over the tokens t of s, in their order

Adapters of any ranks share the padded tensors ``[slots, R, K]`` and ``[slots, N, R]``; what lies beyond a slot's true
rank, or in a slot that no token names, is never read. Tokens without an adapter cost nothing. The shared form serves
several projections of the same x (q, k and v; gate and up) in one call. S is float32 (float64 for float64 adapters),
and y is rounded once. Every step is deterministic, and on one kernel path (``route``'s ``tile``) a token's result does
not depend on the other tokens of the batch.

Sources: Chen et al., "Punica: Multi-Tenant LoRA Serving" (2023); Sheng et al., "S-LoRA" (2023).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _backend, _check
from .._library import autocast_dtype, cast
from .._plan import planned
from ..reference import Routing
from . import multi_lora_arguments as arguments
from . import multi_lora_registered as registered
from .multi_lora_backends import MAX_RANK, REASONS, facts
from .routing import routed

__all__ = ["MAX_RANK", "REASONS", "facts", "multi_lora", "multi_lora_", "multi_lora_shared"]


def multi_lora(
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    token_slots: Tensor | Routing,
    scales: Tensor,
    ranks: Tensor | None = None,
    y: Tensor | None = None,
    backend: str | None = None,
    *,
    dropouts: Sequence[float] | None = None,
    seeds: Tensor | None = None,
) -> Tensor:
    """``y[t] + scale[s] · (drop(x[t]) A[s]ᵀ) B[s]ᵀ`` with ``s = token_slots[t]``; y[t] itself where s is -1.

    Args:
        x: the input ``[..., K]``, T tokens, float16, bfloat16, float32 or float64, any strides.
        lora_a: A ``[slots, R, K]``, in x's dtype or float32.
        lora_b: B ``[slots, N, R]`` in lora_a's dtype.
        token_slots: int32 or int64, a slot for each token and -1 for none, or what ``route`` made of it, once for all
            layers of a step.
        scales: float32 ``[slots]``, on x's device (float64 with float64 adapters).
        ranks: int32 ``[slots]``, the slots' true ranks, 0 ... R; None: R.
        y: what is added to, ``[..., N]`` in x's dtype; it is not modified. None: 0.
        backend: "cuda", "triton" or "reference", which then serves the call, or raises with the reason why it cannot.
            None takes the environment's ``FASTPEFT_BACKEND``, and without one the first of the three that can serve.
        dropouts: for each slot the probability of dropping an element of x, in [0, 1). None: nobody drops anything.
        seeds: int64 ``[slots]`` of the dropout masks, None: drawn from torch's generator. A mask's rows count the
            slot's own tokens, so an adapter draws in any batch the mask that ``lora_linear`` draws for it alone.

    Returns:
        ``[..., N]`` in x's dtype. Differentiable in x, lora_a, lora_b and y.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value, or the backend asked for cannot serve the call.
            Every message names the op, the argument, what it is and what was expected.
    """
    operands = x, [lora_a], [lora_b], token_slots, scales, ranks, [y], backend
    return _call("multi_lora", arguments.ONE, *operands, dropouts, seeds)[0]


def multi_lora_shared(
    x: Tensor,
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    token_slots: Tensor | Routing,
    scales: Tensor,
    ranks: Tensor | None = None,
    ys: Sequence[Tensor | None] | None = None,
    backend: str | None = None,
    *,
    dropouts: Sequence[float] | None = None,
    seeds: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """``multi_lora`` for up to 4 projections (slices) of one x, which is read once for all of them.

    Each slice has its own R and N. Every list has an item for each slice.

    Args:
        x: the input ``[..., K]``, as in ``multi_lora``.
        lora_as: A_p ``[slots, R_p, K]``.
        lora_bs: B_p ``[slots, N_p, R_p]``.
        token_slots: a slot for each token, or what ``route`` made of them, as in ``multi_lora``.
        scales: ``[slots]``, or ``[P, slots]`` where slices differ.
        ranks: ``[slots]``, or ``[P, slots]`` where slices differ; None: R_p.
        ys: ``[..., N_p]`` or None; None for all: 0.
        backend: "cuda", "triton" or "reference", which then serves the call, or raises with the reason why it cannot.
            None takes the environment's ``FASTPEFT_BACKEND``, and without one the first of the three that can serve.
        dropouts: for each slot the probability of dropping an element of x, the same in every slice.
        seeds: int64 ``[P, slots]``: every slice has its own mask. ``[slots]`` for one slice. None: drawn.

    Returns:
        One ``[..., N_p]`` in x's dtype for each slice.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value, or the backend asked for cannot serve the call.
            Every message names the op, the argument and its item, what it is and what was expected.
    """
    if ys is None:
        ys = [None] * len(_check.items("multi_lora_shared", "lora_as", lora_as))
    operands = x, lora_as, lora_bs, token_slots, scales, ranks, ys, backend
    return tuple(_call("multi_lora_shared", arguments.SHARED, *operands, dropouts, seeds))


def multi_lora_(
    y: Tensor | Sequence[Tensor],
    x: Tensor,
    lora_a: Tensor | Sequence[Tensor],
    lora_b: Tensor | Sequence[Tensor],
    token_slots: Tensor | Routing,
    scales: Tensor,
    ranks: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | Sequence[Tensor]:
    """``multi_lora`` in place on y, for serving: no gradient, no dropout, nothing else is written.

    y, lora_a and lora_b are tensors, or lists of them for the slices of the shared form.

    Args:
        y: what is added to, ``[T, N]`` with any strides (no two elements in one place), or contiguous. Its rows whose
            token has no adapter are not touched.
        x: the input ``[..., K]``, as in ``multi_lora``.
        lora_a: A ``[slots, R, K]``.
        lora_b: B ``[slots, N, R]``.
        token_slots: int32 or int64, a slot for each token and -1 for none, or what ``route`` made of it, once for all
            layers of a step.
        scales: float32 ``[slots]``, on x's device (float64 with float64 adapters).
        ranks: int32 ``[slots]``, the slots' true ranks, 0 ... R; None: R.
        backend: "cuda", "triton" or "reference", which then serves the call, or raises with the reason why it cannot.
            None takes the environment's ``FASTPEFT_BACKEND``, and without one the first of the three that can serve.

    Returns:
        y, the very argument.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value, or the backend asked for cannot serve the call.
            Every message names the op, the argument, what it is and what was expected.
    """
    one = isinstance(y, Tensor)
    names = arguments.ONE if one else arguments.LISTS
    lora_as, lora_bs, ys = ([t] if one else t for t in (lora_a, lora_b, y))
    _call("multi_lora_", names, x, lora_as, lora_bs, token_slots, scales, ranks, ys, backend, inplace=True)
    return y


def _call(
    op, names, x, lora_as, lora_bs, token_slots, scales, ranks, ys, backend, dropouts=None, seeds=None, inplace=False
):
    _check.floating(op, "x", x)
    wanted = autocast_dtype(x)
    if wanted is not None:
        x = x.to(wanted)
        ys = ys if inplace else [cast(y, wanted) for y in ys]
    return _planned(op, names, x, lora_as, lora_bs, token_slots, scales, ranks, ys, backend, dropouts, seeds, inplace)


@planned
def _planned(op, names, x, lora_as, lora_bs, token_slots, scales, ranks, ys, backend, dropouts, seeds, inplace):
    """Check everything, route the tokens if nobody has, flatten x's leading dimensions once and restore them."""
    shape = x.shape
    flat = x.reshape(-1, shape[-1])
    sizes = {"T": flat.shape[0], "K": shape[-1]}
    arguments.slices(op, names, x, lora_as, lora_bs, ys, sizes)
    slots, count = sizes["slots"], len(lora_as)
    backend = _backend.choose(op, backend, REASONS, x, lora_as, lora_bs, ys, dropouts)
    routing = routed(op, "token_slots", token_slots, slots, sizes["T"], x, backend)
    sums = torch.float64 if lora_as[0].dtype == torch.float64 else torch.float32
    scales = arguments.table(op, "scales", scales, sums, count, slots, x)
    absent = x.new_empty(0)
    ranks = absent if ranks is None else arguments.table(op, "ranks", ranks, torch.int32, count, slots, x)
    tables = *routing[:3], scales, ranks
    if inplace:
        arguments.inplace(op, x, lora_as, lora_bs, ys)
        views = [y.view(-1, y.shape[-1]) for y in ys]
        registered.multi_lora_(views, flat, list(lora_as), list(lora_bs), *tables, routing.tile, backend)
        return []
    dropout = arguments.dropout(op, dropouts, seeds, count, slots, x)
    flat_ys = [absent if y is None else y.reshape(-1, y.shape[-1]) for y in ys]
    outs, _ = registered.multi_lora(
        flat, list(lora_as), list(lora_bs), flat_ys, *tables, *dropout, routing.tile, backend
    )
    return [out.reshape(*shape[:-1], out.shape[-1]) for out in outs]
