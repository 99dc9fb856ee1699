"""The gated MLP of a Llama block with LoRA on its three projections, as one node of autograd.

    gate = x W_gᵀ + S_g B_gᵀ        up = x W_uᵀ + S_u B_uᵀ        S_p = scale_p · drop_p(x) A_pᵀ
    h    = act(gate) ∘ up           y  = h W_dᵀ + S_d B_dᵀ        S_d = scale_d · drop_d(h) A_dᵀ
    dh   = dy W_d + mask ∘ (dS_d A_d) / (1 - p)                   dgate = dh ∘ up ∘ act'(gate), dup = dh ∘ act(gate)
    dx   = dgate W_g + dup W_u + their low-rank terms             dA, dB as of lora_linear

Saved for backward: x, gate, up and the three S. PyTorch keeps act(gate) and h beside them, for each projection a
dropped or float32 copy of its input where there is dropout or a float32 adapter, and in backward holds three tensors
of the intermediate width I at once. Here h, dh, dgate and dup exist for some rows at a time (``chunk_rows``): row by
row they depend on nothing else, so chunks change neither a mask (its rows are numbered through) nor dx by a bit more
than the shape of a product does. The gradients of A and B are sums over rows: each chunk's is rounded to their dtype,
and their sum once more. Where a weight or a bias asks for its gradient, there is one chunk.

The products are ``lora_linear``'s steps: gate and up share x, low-rank terms are written first and the base GEMM
accumulates onto them. Nothing that is kept is overwritten. Every step is deterministic. Where a weight is quantised
(``fastpeft.ops.Base``), I is cut in place of the rows (``lora_mlp_parts``), and no weight is kept or written out twice.

Under checkpoints x alone is kept, and chunks compute the rest again (``lora_mlp_promise``).

Sources: Shazeer, "GLU Variants Improve Transformer" (2020); Hu et al., "LoRA" (2021).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _backend, _check, reference
from .._library import autocast_dtype, cast, register_op
from .._plan import planned
from . import lora_linear_arguments, lora_mlp_parts, lora_mlp_promise
from . import lora_mlp_arguments as arguments
from . import lora_mlp_chunks as chunks
from .base import Base, Written, parts, shapes
from .base_parts import Parts
from .lora_mlp_arguments import REASONS, facts

__all__ = ["REASONS", "facts", "lora_mlp"]


def _implementation(
    x, weights, tables, lora_as, lora_bs, biases, scales, dropouts, seeds, layouts, activation, backend
):
    impl, linear = _backend.load("lora_mlp", backend), _backend.load("lora_linear", backend)
    if layouts:
        given = lora_mlp_parts.Operands(lora_as, lora_bs, scales, dropouts, seeds, activation)
        with Parts(x, weights, tables, layouts, backend) as written:
            return lora_mlp_parts.forward(impl, linear, x, written, biases, given)
    lists = weights, lora_as, lora_bs, biases, scales, dropouts
    return chunks.forward(impl, linear, x, lists, seeds, activation)


def _fake(x, weights, tables, lora_as, lora_bs, biases, scales, dropouts, seeds, layouts, activation, backend):
    rows, adapter = x.shape[0], lora_as[0].dtype
    gate, up, y = (x.new_empty(rows, b.shape[0]) for b in lora_bs)
    s_down = x.new_empty(rows, lora_as[2].shape[0], dtype=adapter)
    s = x.new_empty(rows, lora_as[0].shape[0] + lora_as[1].shape[0], dtype=adapter)
    return [y], [s, s_down, gate, up]


def _promise(x, weights, tables, lora_as, lora_bs, *_):
    """A stand-in for y that takes no memory, and nothing in the place of what ``_implementation`` has kept."""
    return [x.new_empty_strided((x.shape[0], lora_bs[2].shape[0]), (0, 0))], [x.new_empty(0) for _ in range(4)]


def _setup_context(ctx, inputs, output):
    x, weights, tables, lora_as, lora_bs, biases, scales, dropouts, seeds, *settings = inputs
    s, s_down, gate, up = output[1]
    ctx.needs = [x.requires_grad] + [any(t.requires_grad for t in ts) for ts in (weights, lora_as, lora_bs, biases)]
    _, need_dw, need_da, need_db, _ = ctx.needs
    absent = x.new_empty(0)
    keeps_x = need_da or need_dw or chunks.is_absent(gate)
    kept = x if keeps_x else absent, s if need_db else absent, s_down if need_db else absent
    ctx.save_for_backward(*kept, gate, up, seeds, *weights, *lora_as, *lora_bs, *biases, *tables)
    ctx.settings = scales, dropouts, *settings


def _backward(ctx, grads, _):
    x, s, s_down, gate, up, seeds, *rest = ctx.saved_tensors
    scales, dropouts, layouts, *settings = ctx.settings
    weights, lora_as, lora_bs, biases, tables = rest[:3], rest[3:6], rest[6:9], rest[9:12], rest[12:]
    none = [None] * len(tables)
    if grads[0] is None:
        return None, [None] * 3, none, *[[None] * 3] * 3, *_rest(layouts)
    operands = weights, tables, lora_as, lora_bs, biases, scales, dropouts, seeds, ctx.needs, layouts, *settings
    found = _lora_mlp_backward(grads[0], x, s, s_down, gate, up, *operands)
    groups = [found[i : i + 3] if need else [None] * 3 for i, need in zip((1, 4, 7, 10), ctx.needs[1:], strict=True)]
    return found[0] if ctx.needs[0] else None, groups[0], none, *groups[1:], *_rest(layouts)


def _rest(layouts):
    """The gradients behind the tensors'; torch.library takes a list without items for one of tensors."""
    return None, None, None, None if layouts else [], None, None


def _definition(ctx, grads):
    x, _, _, _, _, seeds, *rest = ctx.saved_tensors
    if chunks.is_absent(x):
        raise RuntimeError("lora_mlp: create_graph=True with a frozen lora_a, expected a trained one: x is not kept")
    scales, dropouts, layouts, activation, backend = ctx.settings
    weights, lora_as, lora_bs, biases, tables = rest[:3], rest[3:6], rest[6:9], rest[9:12], rest[12:]
    if layouts:
        weights = Written(x, weights, tables, layouts, backend).apart()

    def outputs(x, weights, _, lora_as, lora_bs, biases, *__):
        drawn = seeds if seeds.numel() else None
        given = [bias if bias.numel() else None for bias in biases]
        return [reference.lora_mlp(x, weights, lora_as, lora_bs, given, scales, dropouts, drawn, activation)]

    return (x, weights, [None] * len(tables), lora_as, lora_bs, biases, *_rest(layouts)), outputs


def _backward_implementation(
    dy, x, s, s_down, gate, up, weights, tables, lora_as, lora_bs, biases, scales, dropouts, seeds, needs, layouts,
    activation, backend,
):  # fmt: skip
    """``[dx, *dW, *dA, *dB, *dbias]``; what is not needed is an empty tensor."""
    impl, linear = _backend.load("lora_mlp", backend), _backend.load("lora_linear", backend)
    saved = x, s, s_down, gate, up
    if layouts:
        given = lora_mlp_parts.Operands(lora_as, lora_bs, scales, dropouts, seeds, activation)
        with Parts(dy, weights, tables, layouts, backend) as written:
            found = lora_mlp_parts.Backward(impl, linear, dy, saved, written, biases, given, needs).run()
    else:
        lists = weights, lora_as, lora_bs, biases, scales, dropouts
        found = chunks.backward(impl, linear, dy, saved, lists, seeds, needs, activation)
    return [dy.new_empty(0) if grad is None else grad for grad in found]


def _backward_fake(
    dy, x, s, s_down, gate, up, weights, tables, lora_as, lora_bs, biases, scales, dropouts, seeds, needs, layouts,
    activation, backend,
):  # fmt: skip
    need_dx, need_dw, need_da, need_db, need_dbias = needs
    empty, absent = dy.new_empty, dy.new_empty(0)
    own = [need_dw and shape is None for shape in shapes(weights, layouts)]
    groups = *zip(weights, own, strict=True), *((t, need_da) for t in lora_as), *((t, need_db) for t in lora_bs)
    return [
        empty(dy.shape[0], lora_as[0].shape[1]) if need_dx else absent.clone(),
        *(empty(t.shape, dtype=t.dtype) if need else absent.clone() for t, need in groups),
        *(empty(b.shape[0], dtype=b.dtype) if need_dbias else absent.clone() for b in lora_bs),
    ]


_LISTS = "Tensor[] weights, Tensor[] tables, Tensor[] lora_as, Tensor[] lora_bs, Tensor[] biases"
_SETTINGS = "float[] scales, float[] dropouts, Tensor seeds"
_SCHEMA = f"(Tensor x, {_LISTS}, {_SETTINGS}, int[] layouts, str activation, str backend) -> (Tensor[], Tensor[])"
_lora_mlp_backward = register_op(
    "lora_mlp_backward",
    f"(Tensor dy, Tensor x, Tensor s, Tensor s_down, Tensor gate, Tensor up, {_LISTS}, {_SETTINGS}, bool[] needs, "
    "int[] layouts, str activation, str backend) -> Tensor[]",
    _backward_implementation,
    _backward_fake,
)
_lora_mlp = register_op(
    "lora_mlp",
    _SCHEMA,
    _implementation,
    _fake,
    _setup_context,
    _backward,
    _definition,
)
_lora_mlp_promise = register_op("lora_mlp_promise", _SCHEMA, _promise, _promise, _setup_context, _backward, _definition)


def lora_mlp(
    x: Tensor,
    weights: Sequence[Tensor | Base],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    scales: Sequence[float] | None = None,
    dropouts: Sequence[float] | None = None,
    seeds: Sequence[int | Tensor | None] | None = None,
    activation: str = "silu",
    backend: str | None = None,
) -> Tensor:
    """``y = down(act(gate(x)) ∘ up(x))``, each projection a ``lora_linear`` (SwiGLU and GeGLU, Shazeer, 2020).

    Every list has three items, of gate, up and down. What is kept for backward is x, gate and up, and what exists
    beside them at any time is a few rows of the intermediate width: the least that a gated MLP was seen to need. Under
    ``torch.utils.checkpoint``, or ``save_on_cpu``, x alone is kept, and backward makes the rest again.

    Args:
        x: the input ``[..., K]``, float16, bfloat16, float32 or float64, any strides.
        weights: ``[I, K]``, ``[I, K]`` and ``[N, I]`` in x's dtype, any strides. They get a gradient only if they ask.
            Or frozen ones in 4 or 8 bits, a ``Base``, of which parts are written out in x's dtype where they are read.
        lora_as: A of each, ``[r, K]``, ``[r, K]`` and ``[r, I]``, each of its own rank, all in x's dtype or all in
            float32, in which the low-rank branches are then computed.
        lora_bs: B of each, ``[I, r]``, ``[I, r]`` and ``[N, r]``, in the same dtype.
        biases: ``[I]``, ``[I]`` and ``[N]`` in x's dtype or the adapters', or None; None for all: no biases.
        scales: factors of the low-rank terms, without a unit; None for all: 1.
        dropouts: probabilities of dropping an element of a low-rank branch's input, in [0, 1), rounded to 2**-16; None
            for all: 0.
        seeds: of the dropout masks, as in ``lora_linear``; None for all: each is drawn.
        activation: "silu", "gelu" (erf) or "gelu_tanh", as ``torch.nn.functional`` has them.
        backend: "triton" or "reference", which then serves the call, or raises with the reason why it cannot. None
            takes the environment's ``FASTPEFT_BACKEND``, and without one the first that can serve.

    Returns:
        ``[..., N]`` in x's dtype. Under autocast x, weights and biases are cast to autocast's dtype first.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value, or the backend asked for cannot serve the call.
            Every message names the op, the argument and its item, what it is and what was expected.
        RuntimeError: in a backward with ``create_graph=True`` where every A is frozen, since x is then not kept.
    """
    given: dict[str, Sequence | None] = {"lora_as": lora_as, "lora_bs": lora_bs}
    given |= {"biases": biases, "scales": scales, "dropouts": dropouts, "seeds": seeds}
    lora_as, lora_bs, biases, scales, dropouts, seeds = arguments.lists(weights, given)
    _check.floating("lora_mlp", "x", x)
    wanted = autocast_dtype(x)
    if wanted is not None:
        x, weights, biases = x.to(wanted), [cast(t, wanted) for t in weights], [cast(t, wanted) for t in biases]
        lora_as, lora_bs = ([cast(t, wanted, torch.float32) for t in ts] for ts in (lora_as, lora_bs))
    weights, tables, layouts = parts(weights)
    operands = x, weights, tables, lora_as, lora_bs, biases, scales, dropouts
    settings = layouts, activation, backend
    if not lora_mlp_promise.pays():
        return _planned(*operands, seeds, *settings)[0]
    y, *drawn = _promised(*operands, seeds, *settings)
    seeds = drawn[0] if drawn else seeds
    return lora_mlp_promise.keep(y, lambda: _planned(*operands, seeds, *settings)[0])


@planned
def _planned(*given):
    """All that is left to do once autocast has cast, which a plan stands for."""
    (y,), _ = _lora_mlp(*_checked(*given))
    shape = given[0].shape
    return [y if len(shape) == 2 else y.reshape(*shape[:-1], y.shape[-1])]


@planned
def _promised(*given):
    """The stand-in for y, and the seeds where there are any."""
    x, *lists, seeds, layouts, activation, backend = _checked(*given)
    (y,), _ = _lora_mlp_promise(x, *lists, seeds, layouts, activation, backend)
    return [y, seeds] if seeds.numel() else [y]


def _checked(x, weights, tables, lora_as, lora_bs, biases, scales, dropouts, seeds, layouts, activation, backend):
    """What the op is given; ``seeds`` may be those that ``_promised`` has drawn."""
    arguments.tensors(x, weights, shapes(weights, layouts), lora_as, lora_bs, biases)
    scales, dropouts = lora_linear_arguments.numbers("lora_mlp", True, scales, dropouts)
    activation = arguments.activation(activation)
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    backend = _backend.choose("lora_mlp", backend, REASONS, flat, lora_as, weights)
    if not isinstance(seeds, Tensor):
        seeds = lora_linear_arguments.seeds("lora_mlp", True, seeds, dropouts, x)
    absent = x.new_empty(0)
    biases = [absent if bias is None else bias for bias in biases]
    lists = list(weights), tables, list(lora_as), list(lora_bs), biases
    return flat, *lists, scales, dropouts, seeds, layouts, activation, backend
