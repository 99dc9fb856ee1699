"""LoRA around frozen linear layers, fused.

    y = x Wᵀ + bias + S Bᵀ            S  = scale · drop(x) Aᵀ                          saved for backward: x and S
    dS = scale · dY B                 dB = dYᵀ S                                       one read of dY
    dX = mask ∘ (dS A) / (1 - p) + dY W
    dA = dSᵀ drop(x)                  the mask is drawn again from the seed            one read of x

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

from .. import _backend, _check
from .._library import register_op
from ..reference.dropout import threshold

MAX_RANK = 512


def _implementation(x, weights, lora_as, lora_bs, biases, scales, dropouts, seeds, backend):
    impl = _backend.load("lora_linear", backend)
    if backend == "cuda":  # the low-rank term inside the GEMM
        return impl.forward(x, weights, lora_as, lora_bs, biases, scales, dropouts, seeds)
    s = impl.down(x, lora_as, scales, dropouts, seeds)
    ys = []
    for weight, b, bias, s_p in zip(weights, lora_bs, biases, _split(s, lora_as), strict=True):
        y = impl.up(s_p, b, bias if bias.numel() else None, x.dtype)
        ys.append(y.addmm_(x, weight.T) if weight.numel() else y)
    return ys, s


def _fake(x, weights, lora_as, lora_bs, biases, scales, dropouts, seeds, backend):
    ys = [x.new_empty(x.shape[0], b.shape[0]) for b in lora_bs]
    return ys, x.new_empty(x.shape[0], sum(a.shape[0] for a in lora_as), dtype=lora_as[0].dtype)


def _setup_context(ctx, inputs, output):
    x, weights, lora_as, lora_bs, biases, scales, dropouts, seeds, backend = inputs
    ctx.needs = [x.requires_grad] + [any(t.requires_grad for t in ts) for ts in (weights, lora_as, lora_bs, biases)]
    _, need_dw, need_da, need_db, _ = ctx.needs
    absent = x.new_empty(0)
    saved_x = x if need_da or need_dw else absent
    saved_s = output[1] if need_db else absent
    ctx.save_for_backward(saved_x, saved_s, seeds, *weights, *lora_as, *lora_bs)
    ctx.settings = scales, dropouts, backend


def _backward(ctx, grads, _):
    x, s, seeds, *rest = ctx.saved_tensors
    count = len(rest) // 3
    weights, lora_as, lora_bs = rest[:count], rest[count : 2 * count], rest[2 * count :]
    scales, dropouts, backend = ctx.settings
    rows = next(grad.shape[0] for grad in grads if grad is not None)
    dys = [x.new_zeros(rows, b.shape[0]) if dy is None else dy for dy, b in zip(grads, lora_bs, strict=True)]
    dx, *flat = _lora_linear_backward(dys, x, s, weights, lora_as, lora_bs, scales, dropouts, seeds, ctx.needs, backend)
    groups = [flat[i * count : (i + 1) * count] if need else [None] * count for i, need in enumerate(ctx.needs[1:])]
    return dx if ctx.needs[0] else None, *groups, None, None, None, None


def _backward_implementation(dys, x, s, weights, lora_as, lora_bs, scales, dropouts, seeds, needs, backend):
    """``[dX, *dW, *dA, *dB, *dbias]``; what is not needed is an empty tensor."""
    impl = _backend.load("lora_linear", backend)
    need_dx, need_dw, need_da, need_db, need_dbias = needs
    absent = [None] * len(dys)
    steps = [
        impl.up_backward(dy, s_p, b, scale, need_dx or need_da, need_db)
        for dy, s_p, b, scale in zip(dys, _split(s, lora_as) if need_db else absent, lora_bs, scales, strict=True)
    ]
    dx = das = None
    if need_dx or need_da:
        ds = steps[0][0] if len(steps) == 1 else torch.cat([ds for ds, _ in steps], 1)
        base = (dys, weights) if backend == "cuda" else ()
        dx, das = impl.down_backward(ds, x, lora_as, dropouts, seeds, need_dx, need_da, *base)
    for dy, weight in zip(dys, weights, strict=True):
        if need_dx and weight.numel() and backend != "cuda":
            dx.addmm_(dy, weight)
    grads = [
        dx,
        *(dy.T @ x if need_dw and weight.numel() else None for dy, weight in zip(dys, weights, strict=True)),
        *(das if need_da else absent),
        *(db for _, db in steps),
        *(dy.sum(0, dtype=b.dtype) if need_dbias else None for dy, b in zip(dys, lora_bs, strict=True)),
    ]
    return [x.new_empty(0) if grad is None else grad for grad in grads]


def _backward_fake(dys, x, s, weights, lora_as, lora_bs, scales, dropouts, seeds, needs, backend):
    need_dx, need_dw, need_da, need_db, need_dbias = needs
    empty = x.new_empty
    return [
        empty(dys[0].shape[0], lora_as[0].shape[1]) if need_dx else empty(0),
        *(empty(w.shape) if need_dw and w.numel() else empty(0) for w in weights),
        *(torch.empty_like(a, memory_format=torch.contiguous_format) if need_da else empty(0) for a in lora_as),
        *(torch.empty_like(b, memory_format=torch.contiguous_format) if need_db else empty(0) for b in lora_bs),
        *(empty(b.shape[0], dtype=b.dtype) if need_dbias else empty(0) for b in lora_bs),
    ]


_OPERANDS = (
    "Tensor x, {} Tensor[] weights, Tensor[] lora_as, Tensor[] lora_bs, {} "
    "float[] scales, float[] dropouts, Tensor seeds, {} str backend"
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
)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None = None,
    scale: float = 1.0,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``y = x Wᵀ + bias + scale · (drop(x) Aᵀ) Bᵀ``.

    Args:
        x: ``[..., K]``, float16, bfloat16, float32 or float64, any strides.
        weight: ``[N, K]`` in x's dtype, any strides (a Conv1D passes ``weight.T``). It gets a gradient only if it asks.
        lora_a: ``[r, K]``; lora_b: ``[N, r]``. Both in x's dtype or both float32; then the low-rank branch is computed
            in float32 and x is never copied to float32.
        bias: ``[N]`` in x's dtype or the adapter's.
        scale: factor of the low-rank term: ``alpha / r``, or ``alpha / sqrt(r)`` for rsLoRA.
        dropout: probability of dropping an element of x in the low-rank branch, in [0, 1), rounded to 2**-16.
        seed: of the dropout mask (see ``fastpeft.reference.keep_mask``): a 64-bit integer, an int64 tensor of one
            element on x's device, or None to draw one from torch's generator for that device.
        backend: "cuda", "triton", "reference", or None for ``FASTPEFT_BACKEND`` and then the automatic choice.

    Returns:
        ``[..., N]`` in x's dtype. Under autocast x, weight and bias are cast to autocast's dtype first.

        With 16-bit x and float32 adapters, the low-rank term is rounded to 16 bits before the base is added (in PEFT
        the base is, before the term): with rms t of the term and b of the base, y's rms error is
        sqrt((2 t² + b²) / (t² + 2 b²)) of PEFT's. Measured: 0.71 for small terms, 1.00 at t = b, 1.22 at t = 2 b.

    Raises:
        TypeError, ValueError: naming the argument, what it is and what was expected.
    """
    return _call("lora_linear", x, [weight], [lora_a], [lora_b], [bias], [scale], [dropout], [seed], backend, "")[0]


def lora_linear_shared(
    x: Tensor,
    weights: Sequence[Tensor | None],
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
    mask; the adapters share one dtype. ``weights[p]`` may be None: y_p is then the low-rank term (and bias) alone,
    which is how several active adapters of one layer are added up. Arguments, errors and dtypes as in ``lora_linear``.

    Returns:
        One ``[..., N_p]`` for each projection.
    """
    count = len(weights)
    lists = {
        "lora_as": lora_as,
        "lora_bs": lora_bs,
        "biases": [None] * count if biases is None else biases,
        "scales": [1.0] * count if scales is None else scales,
        "dropouts": [0.0] * count if dropouts is None else dropouts,
        "seeds": [None] * count if seeds is None else seeds,
    }
    for name, values in lists.items():
        if len(values) != count or count == 0:
            raise ValueError(f"lora_linear_shared: {name} has {len(values)} items, expected {max(count, 1)}")
    return tuple(_call("lora_linear_shared", x, weights, *lists.values(), backend, "s"))


def explain(
    x: Tensor, weight: Tensor | None, lora_a: Tensor, lora_b: Tensor | None = None, *_, backend: str | None = None, **__
) -> str:
    """Which backend serves ``lora_linear`` on these tensors, its configuration, and why the others do not."""
    facts = x, [lora_a], [weight], [] if lora_b is None else [lora_b]
    return _backend.explain("lora_linear", backend, REASONS, *facts)


def _call(op, x, weights, lora_as, lora_bs, biases, scales, dropouts, seeds, backend, plural):
    """Check everything, then flatten x's leading dimensions once and restore them."""
    if not isinstance(x, Tensor) or x.dim() == 0:
        raise TypeError(f"{op}: x is {x if not isinstance(x, Tensor) else 'a scalar'}, expected a tensor [..., K]")
    shape, device = x.shape, x.device
    if device.type != "meta" and torch.is_autocast_enabled(device.type) and x.dtype != torch.float64:
        wanted = torch.get_autocast_dtype(device.type)
        x, *tensors = (t.to(wanted) if isinstance(t, Tensor) else t for t in (x, *weights, *biases))
        weights, biases = tensors[: len(weights)], tensors[len(weights) :]
        lora_as, lora_bs = ([_adapter_to(t, wanted) for t in ts] for ts in (lora_as, lora_bs))
    if not x.is_floating_point():
        raise TypeError(f"{op}: x has dtype {x.dtype}, expected a floating-point dtype")
    sizes = {"K": shape[-1]}
    for weight, a, b, bias in zip(weights, lora_as, lora_bs, biases, strict=True):
        _check_branch(op, plural, x, weight, a, b, bias, lora_as[0], {**sizes})
    scales = [_check.finite(op, f"scale{plural}", scale) for scale in scales]
    dropouts = [_check.probability(op, f"dropout{plural}", dropout) for dropout in dropouts]
    flat = x if len(shape) == 2 else x.reshape(-1, shape[-1])
    backend = _backend.choose(op, backend, REASONS, flat, lora_as, weights, lora_bs)
    absent = x.new_empty(0)
    drawn = []
    if any(map(threshold, dropouts)):
        drawn = [_check.seed(op, f"seed{plural}", seed, device) for seed in seeds]
    ys, _ = _lora_linear(
        flat,
        [absent if weight is None else weight for weight in weights],
        list(lora_as),
        list(lora_bs),
        [absent if bias is None else bias for bias in biases],
        scales,
        dropouts,
        drawn[0] if len(drawn) == 1 else torch.cat(drawn) if drawn else absent,
        backend,
    )
    return ys if len(shape) == 2 else [y.reshape(*shape[:-1], y.shape[-1]) for y in ys]


def _adapter_to(t, wanted):
    return t.to(wanted) if isinstance(t, Tensor) and t.dtype != torch.float32 else t


def _check_branch(op, plural, x, weight, a, b, bias, first_a, sizes):
    if weight is not None:
        _check.tensor(op, f"weight{plural}", weight, ("N", "K"), sizes, x)
        _check.dtype(op, f"weight{plural}", weight, x.dtype)
    _check.tensor(op, f"lora_a{plural}", a, ("r", "K"), sizes, x)
    _check.tensor(op, f"lora_b{plural}", b, ("N", "r"), sizes, x)
    _check.dtype(op, f"lora_a{plural}", a, x.dtype, torch.promote_types(x.dtype, torch.float32))
    _check.dtype(op, f"lora_a{plural}", a, first_a.dtype)
    _check.dtype(op, f"lora_b{plural}", b, first_a.dtype)
    if a.shape[0] == 0:
        raise ValueError(f"{op}: lora_a{plural} has r=0, expected r>=1")
    if bias is not None:
        _check.tensor(op, "bias" if not plural else "biases", bias, ("N",), sizes, x)
        _check.dtype(op, "bias" if not plural else "biases", bias, x.dtype, first_a.dtype)


def _triton_reason(x, lora_as, *_):
    return _backend.triton_lora_reason(x, lora_as[0].dtype, sum(a.shape[0] for a in lora_as), MAX_RANK)


def _cuda_reason(x, lora_as, weights=(), lora_bs=()):
    found = _backend.cuda_reason(x, "sm_90 (wgmma)", lambda capability: capability == 90) or _triton_reason(x, lora_as)
    if found is not None:
        return found
    impl, ranks = _backend.load("lora_linear", "cuda"), [a.shape[0] for a in lora_as]
    if x.dtype not in impl.DTYPES or lora_as[0].dtype != x.dtype:
        return f"x in {x.dtype} and adapters in {lora_as[0].dtype}, expected both bfloat16 or both float16"
    if sum(ranks) > impl.MAX_RANK or any(rank % 8 for rank in ranks):
        return f"ranks {ranks}, expected multiples of 8 that add up to {impl.MAX_RANK} at most"
    base = [weight for weight in weights if weight is not None]
    if weights and not base:
        return "no weight, so no GEMM to compute the low-rank term in"
    if any(size % 8 for weight in base for size in weight.shape):
        return f"weight has shape {[list(weight.shape) for weight in base]}, expected multiples of 8"
    read = [("weight", weight) for weight in base] + [("lora_b", b) for b in lora_bs]
    read.append(("x", x if x.dim() == 2 else x.reshape(-1, x.shape[-1])))
    return next(filter(None, (impl.unfit(name, t) for name, t in read)), None)


def _cuda_unasked(x, lora_as, weights=(), lora_bs=()):
    widest = max((weight.shape[0] for weight in weights if weight is not None), default=0)
    return _backend.cuda_unasked("lora_linear", x, widest, sum(a.shape[0] for a in lora_as))


REASONS = {
    "cuda": _cuda_reason,
    _backend.UNASKED: _cuda_unasked,
    "triton": _triton_reason,
    "reference": lambda *_: None,
}


def _split(s: Tensor, lora_as: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (s,) if len(lora_as) == 1 else s.split([a.shape[0] for a in lora_as], 1)
