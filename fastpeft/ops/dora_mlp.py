"""The gated MLP of a Llama block with DoRA on its three projections, as one node of autograd.

    gate = g_g ∘ u_g + S_g C_gᵀ        u_g = x W_gᵀ, S_g = scale_g · x A_gᵀ, C_g = g_g ∘ B_g, up likewise
    h    = act(gate) ∘ up               y  = g_d ∘ u_d + S_d C_dᵀ
    dh   = (g_d ∘ dy) W_d + dS_d A_d    dgate = dh ∘ up ∘ act'(gate), dup = dh ∘ act(gate)
    dx   = (g_g ∘ dgate) W_g + (g_u ∘ dup) W_u + dS_g A_g + dS_u A_u          dA, dB, dm as of dora_linear

g = m / ‖W + scale · B A‖ is made as in ``dora_linear``, and so is what dropout changes. Saved for backward: x, the
three S, and u of all three: gate and up are made of u and S again by a product of rank r, for some rows at a time, as
is all else of their size (``dora_mlp_steps``), where DoRA by layers keeps both, the activation and h too. With dropout
gate and up are kept beside u, since they have x Wᵀ in them. A projection without a magnitude is LoRA: then, or where
the magnitude is frozen, gate or up is kept in place of u.

Chunks change a mask by nothing and dx by no more than the shape of a product does. The gradients of A and B are sums
over rows: each chunk's is rounded to their dtype, and their sum once more. Weights are frozen, dense or quantised
(``fastpeft.ops.Base``). Nothing that is kept is overwritten. Every step is deterministic.

Sources: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation" (2024); Shazeer, "GLU Variants" (2020).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _backend, _check, reference
from .._library import autocast_dtype, cast, register_op
from .._plan import planned
from . import dora_mlp_arguments as arguments
from . import lora_linear_arguments, lora_mlp_arguments
from .base import Base, Written, parts, shapes
from .base_parts import Parts
from .dora_mlp_gradients import Backward
from .dora_mlp_steps import Forward, Operands, Steps
from .lora_mlp_arguments import REASONS, facts

__all__ = ["REASONS", "dora_mlp", "facts"]


def _implementation(
    x, weights, tables, lora_as, lora_bs, magnitudes, biases, norms, scales, dropouts, seeds, layouts, keeps,
    activation, backend,
):  # fmt: skip
    given = Operands(lora_as, lora_bs, magnitudes, biases, scales, dropouts, seeds, activation)
    with Parts(x, weights, tables, layouts, backend) as written:
        return Forward(_steps(backend), x, written, given, norms, keeps).run()


def _fake(
    x, weights, tables, lora_as, lora_bs, magnitudes, biases, norms, scales, dropouts, seeds, layouts, keeps,
    activation, backend,
):  # fmt: skip
    rows, adapter, sizes = x.shape[0], lora_as[0].dtype, [b.shape[0] for b in lora_bs]
    given = Operands(lora_as, lora_bs, magnitudes, biases, scales, dropouts, seeds, activation)
    sums = torch.promote_types(adapter, torch.float32)

    def wide(n: int, there: bool) -> Tensor:
        return x.new_empty(rows, n) if there else x.new_empty(0)

    return [x.new_empty(rows, sizes[2])], [
        x.new_empty(rows, lora_as[0].shape[0] + lora_as[1].shape[0], dtype=adapter),
        x.new_empty(rows, lora_as[2].shape[0], dtype=adapter),
        *(wide(n, keep) for n, keep in zip(sizes, keeps, strict=True)),
        *(wide(sizes[p], given.drops(p) or not keeps[p]) for p in range(2)),
        *(x.new_empty(n, dtype=sums) for n in sizes),
        *(x.new_empty(m.shape[0], dtype=sums) for m in magnitudes),
    ]


def _setup_context(ctx, inputs, output):
    x, weights, tables, lora_as, lora_bs, magnitudes, biases, _, scales, dropouts, seeds, layouts, _, *rest = inputs
    s, s_down, *kept = output[1]
    groups = lora_as, lora_bs, magnitudes, biases
    ctx.needs = [x.requires_grad, *(any(t.requires_grad for t in ts) for ts in groups)]
    _, need_da, need_db, need_dm, _ = ctx.needs
    absent, need_dc = x.new_empty(0), need_db or need_dm
    remade = any(y.dim() < 2 for y in kept[3:5])
    own = x if need_da else absent, s if need_dc or remade else absent, s_down if need_dc else absent
    ctx.save_for_backward(*own, *kept, seeds, *weights, *lora_as, *lora_bs, *magnitudes, *biases, *tables)
    ctx.settings = scales, dropouts, layouts, *rest


def _backward(ctx, grads, _):
    none = [None] * 3
    x, s, s_down, *rest = ctx.saved_tensors
    scales, dropouts, layouts, *settings = ctx.settings
    kept, seeds, lists, tables = rest[:11], rest[11], rest[12:27], rest[27:]
    nones = [None] * len(tables)
    if grads[0] is None:
        return None, none, nones, none, none, none, none, none, *_rest(layouts)
    weights, *groups = (lists[i : i + 3] for i in range(0, 15, 3))
    operands = weights, tables, *groups, scales, dropouts, seeds, ctx.needs, layouts, *settings
    found = _dora_mlp_backward(grads[0], x, s, s_down, kept, *operands)
    grads = [found[i : i + 3] if need else none for i, need in zip((1, 4, 7, 10), ctx.needs[1:], strict=True)]
    return found[0] if ctx.needs[0] else None, none, nones, *grads, none, *_rest(layouts)


def _rest(layouts):
    """The gradients behind the tensors'; torch.library takes a list without items for one of tensors."""
    return None, None, None, None if layouts else [], None, None, None


def _definition(ctx, grads):
    x, _, _, *rest = ctx.saved_tensors
    if x.dim() == 1:
        raise RuntimeError("dora_mlp: create_graph=True with a frozen lora_a, expected a trained one: x is not kept")
    scales, dropouts, layouts, activation, backend = ctx.settings
    norms, seeds, lists, tables = rest[8:11], rest[11], rest[12:27], rest[27:]
    weights, lora_as, lora_bs, magnitudes, biases = (lists[i : i + 3] for i in range(0, 15, 3))
    if layouts:
        weights = Written(x, weights, tables, layouts, backend).apart()

    def outputs(x, _, __, lora_as, lora_bs, magnitudes, biases, *___):
        drawn = seeds if seeds.numel() else None
        present = [[t if t.numel() else None for t in ts] for ts in (magnitudes, biases)]
        operands = x, weights, lora_as, lora_bs, *present, scales, dropouts, drawn, norms, activation
        return [reference.dora_mlp(*operands)]

    none = [None] * 3
    return (x, none, [None] * len(tables), lora_as, lora_bs, magnitudes, biases, none, *_rest(layouts)), outputs


def _backward_implementation(
    dy, x, s, s_down, kept, weights, tables, lora_as, lora_bs, magnitudes, biases, scales, dropouts, seeds, needs,
    layouts, activation, backend,
):  # fmt: skip
    """``[dx, *dA, *dB, *dm, *dbias]``; what is not needed is an empty tensor."""
    given = Operands(lora_as, lora_bs, magnitudes, biases, scales, dropouts, seeds, activation)
    saved = x, s, s_down, kept[:3], kept[3:5], kept[5:8], kept[8:]
    with Parts(dy, weights, tables, layouts, backend) as written:
        found = Backward(_steps(backend), dy, saved, written, given, needs).run()
    return [dy.new_empty(0) if grad is None else grad for grad in found]


def _backward_fake(
    dy, x, s, s_down, kept, weights, tables, lora_as, lora_bs, magnitudes, biases, scales, dropouts, seeds, needs,
    layouts, activation, backend,
):  # fmt: skip
    need_dx, need_da, need_db, need_dm, need_dbias = needs
    groups = (lora_as, need_da), (lora_bs, need_db), (magnitudes, need_dm)
    return [
        dy.new_empty(dy.shape[0], lora_as[0].shape[1]) if need_dx else dy.new_empty(0),
        *(dy.new_empty(t.shape, dtype=t.dtype) if need else dy.new_empty(0) for ts, need in groups for t in ts),
        *(dy.new_empty(b.shape[0], dtype=b.dtype) if need_dbias else dy.new_empty(0) for b in lora_bs),
    ]


def _steps(backend: str) -> Steps:
    mlp, dora, linear = (_backend.load(op, backend) for op in ("lora_mlp", "dora_linear", "lora_linear"))
    return Steps(mlp, dora, linear, backend)


_LISTS = "Tensor[] weights, Tensor[] tables, Tensor[] lora_as, Tensor[] lora_bs, Tensor[] magnitudes, Tensor[] biases"
_SETTINGS = "float[] scales, float[] dropouts, Tensor seeds"
_dora_mlp_backward = register_op(
    "dora_mlp_backward",
    f"(Tensor dy, Tensor x, Tensor s, Tensor s_down, Tensor[] kept, {_LISTS}, {_SETTINGS}, bool[] needs, "
    "int[] layouts, str activation, str backend) -> Tensor[]",
    _backward_implementation,
    _backward_fake,
)
_dora_mlp = register_op(
    "dora_mlp",
    f"(Tensor x, {_LISTS}, Tensor[] norms, {_SETTINGS}, int[] layouts, bool[] keeps, str activation, str backend) "
    "-> (Tensor[], Tensor[])",
    _implementation,
    _fake,
    _setup_context,
    _backward,
    _definition,
)


def dora_mlp(
    x: Tensor,
    weights: Sequence[Tensor | Base],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    magnitudes: Sequence[Tensor | None],
    biases: Sequence[Tensor | None] | None = None,
    scales: Sequence[float] | None = None,
    dropouts: Sequence[float] | None = None,
    seeds: Sequence[int | Tensor | None] | None = None,
    norms: Sequence[Tensor | None] | None = None,
    activation: str = "silu",
    backend: str | None = None,
) -> Tensor:
    """``y = down(act(gate(x)) ∘ up(x))``, each projection a ``dora_linear``, or a ``lora_linear`` without a magnitude.

    Every list has three items, of gate, up and down. What is kept for backward is x and the products of the three
    frozen weights, with dropout gate and up too.

    Args:
        x: the input ``[..., K]``, float16, bfloat16, float32 or float64, any strides.
        weights: ``[I, K]``, ``[I, K]`` and ``[N, I]`` in x's dtype, any strides, or in 4 or 8 bits, a ``Base``, of
            which parts are written out in x's dtype where they are read; frozen.
        lora_as: A of each, ``[r, K]``, ``[r, K]`` and ``[r, I]``, each of its own rank, all in x's dtype or all in
            float32, in which the low-rank branches are then computed.
        lora_bs: B of each, ``[I, r]``, ``[I, r]`` and ``[N, r]``, in the same dtype.
        magnitudes: ``[I]``, ``[I]`` and ``[N]`` in x's dtype or the adapters', the norms that the rows of
            ``W + scale · B A`` are given; None for a projection whose adapter is LoRA.
        biases: ``[I]``, ``[I]`` and ``[N]`` in x's dtype or the adapters', or None; None for all: no biases.
        scales: factors of B A, without a unit; None for all: 1.
        dropouts: probabilities of dropping an element wherever an adapter acts, in [0, 1), rounded to 2**-16; None
            for all: 0.
        seeds: of the dropout masks, as in ``lora_linear``; None for all: each is drawn.
        norms: ``[I]``, ``[I]`` and ``[N]`` as ``dora_norm`` gives them, or None, which has it computed; None for all.
            They are constants to every gradient.
        activation: "silu", "gelu" (erf) or "gelu_tanh", as ``torch.nn.functional`` has them.
        backend: "triton" or "reference", which then serves the call, or raises with the reason why it cannot. None
            takes the environment's ``FASTPEFT_BACKEND``, and without one the first that can serve.

    Returns:
        ``[..., N]`` in x's dtype. Under autocast x, weights and biases are cast to autocast's dtype first.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value, a weight asks for a gradient, or the backend asked
            for cannot serve the call. Every message names the op, the argument and its item, what it is and what was
            expected.
        RuntimeError: in a backward with ``create_graph=True`` where every A is frozen, since x is then not kept.
    """
    given: dict[str, Sequence | None] = {"lora_as": lora_as, "lora_bs": lora_bs, "magnitudes": magnitudes}
    given |= {"biases": biases, "scales": scales, "dropouts": dropouts, "seeds": seeds, "norms": norms}
    lora_as, lora_bs, magnitudes, biases, scales, dropouts, seeds, norms = arguments.lists(weights, given)
    _check.floating("dora_mlp", "x", x)
    wanted = autocast_dtype(x)
    if wanted is not None:
        x, weights, biases = x.to(wanted), [cast(t, wanted) for t in weights], [cast(t, wanted) for t in biases]
        adapters = lora_as, lora_bs, magnitudes
        lora_as, lora_bs, magnitudes = ([cast(t, wanted, torch.float32) for t in ts] for ts in adapters)
    weights, tables, layouts = parts(weights)
    lists = weights, tables, lora_as, lora_bs, magnitudes, biases, norms
    return _planned(x, *lists, scales, dropouts, seeds, layouts, activation, backend)[0]


@planned
def _planned(
    x, weights, tables, lora_as, lora_bs, magnitudes, biases, norms, scales, dropouts, seeds, layouts, activation,
    backend,
):  # fmt: skip
    """All that is left to do once autocast has cast, which a plan stands for."""
    arguments.tensors(x, weights, shapes(weights, layouts), lora_as, lora_bs, magnitudes, biases, norms)
    scales, dropouts = lora_linear_arguments.numbers("dora_mlp", True, scales, dropouts)
    activation = lora_mlp_arguments.activation(activation, "dora_mlp")
    shape = x.shape
    flat = x if len(shape) == 2 else x.reshape(-1, shape[-1])
    backend = _backend.choose("dora_mlp", backend, REASONS, flat, lora_as, weights)
    seeds = lora_linear_arguments.seeds("dora_mlp", True, seeds, dropouts, x)
    keeps = [torch.is_grad_enabled() and m is not None and m.requires_grad for m in magnitudes]
    absent = x.new_empty(0)
    magnitudes, biases, norms = ([absent if t is None else t for t in ts] for ts in (magnitudes, biases, norms))
    lists = list(weights), tables, list(lora_as), list(lora_bs), magnitudes, biases, norms
    (y,), _ = _dora_mlp(flat, *lists, scales, dropouts, seeds, layouts, keeps, activation, backend)
    return [y if len(shape) == 2 else y.reshape(*shape[:-1], y.shape[-1])]
