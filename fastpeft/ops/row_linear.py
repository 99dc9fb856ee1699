"""A linear layer of whose weight only some rows or columns are trained.

    y = x Wᵀ + bias                   the plain GEMM with the live weight, which holds the trained part already
    d(rows) = dY[:, index]ᵀ x         saved for backward: x           n/N of the weight gradient's work
    d(columns) = dYᵀ x[:, index]      saved for backward: x[:, index], n/K of x
    dX = dY W                         dbias = Σ dY

The trained part is a small parameter of its own, so its gradient and the optimizer's state are small too. Columns of dY
are gathered as they are read. Every step is deterministic: sums over row blocks go through partial results added in a
fixed order. Source: Yang et al., "S2FT" (2024).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _backend, _check
from .._library import autocast_dtype, cast, register_op
from .._plan import planned


def _implementation(x, weight, trained, index, bias, columns, backend):
    y = _backend.load("row_linear", backend).forward(x, weight, bias if bias.numel() else None)
    return [y], x.index_select(1, index) if columns else x.new_empty(0)


def _fake(x, weight, trained, index, bias, columns, backend):
    kept = x.new_empty(x.shape[0], index.shape[0]) if columns else x.new_empty(0)
    return [x.new_empty(x.shape[0], weight.shape[0])], kept


def _setup_context(ctx, inputs, output):
    x, weight, trained, index, bias, columns, backend = inputs
    ctx.needs = [t.requires_grad for t in (x, trained, bias)]
    absent = x.new_empty(0)
    saved_x = output[1] if columns else x
    # trained is saved for its dtype, and so that a step of the optimizer between forward and backward is noticed.
    ctx.save_for_backward(saved_x, weight if ctx.needs[0] else absent, trained, index)
    ctx.settings = columns, backend


def _backward(ctx, grads, _):
    (dy,), (need_dx, need_dt, need_db) = grads, ctx.needs
    dx, dt, db = _row_linear_backward(dy, *ctx.saved_tensors, ctx.needs, *ctx.settings)
    return dx if need_dx else None, None, dt if need_dt else None, None, db if need_db else None, None, None


def _definition(ctx, grads):
    x, weight, trained, index = ctx.saved_tensors
    columns, _ = ctx.settings
    need_dx, _, need_db = ctx.needs
    if columns and need_dx:
        raise RuntimeError(
            "row_linear: create_graph=True with columns=True and an x that gets a gradient, expected rows: of x only "
            "the trained columns are kept"
        )
    n = weight.shape[0] if need_dx else grads[0].shape[1]
    bias = x.new_zeros(n, requires_grad=need_db)
    if not need_dx and not columns:
        weight = x.new_zeros(n, x.shape[1])  # not kept: then no gradient depends on it

    def outputs(x, _, trained, __, bias, *___):
        part = trained.to(x.dtype)
        return [F.linear(x, part if columns else weight.index_copy(0, index, part), bias)]

    return (x, None, trained, None, bias, None, None), outputs


def _backward_implementation(dy, x, weight, trained, index, needs, columns, backend):
    """``[dX, d(trained), dbias]``; what is not needed is an empty tensor."""
    need_dx, need_dt, need_db = needs
    dt = None
    if need_dt:
        dt = _backend.load("row_linear", backend).backward(dy, x, None if columns else index, trained.dtype)
    grads = [dy @ weight if need_dx else None, dt, dy.sum(0) if need_db else None]
    return [dy.new_empty(0) if grad is None else grad for grad in grads]


def _backward_fake(dy, x, weight, trained, index, needs, columns, backend):
    need_dx, need_dt, need_db = needs
    empty = dy.new_empty
    return [
        empty(dy.shape[0], weight.shape[1]) if need_dx else empty(0),
        torch.empty_like(trained, memory_format=torch.contiguous_format) if need_dt else empty(0),
        empty(dy.shape[1]) if need_db else empty(0),
    ]


_row_linear_backward = register_op(
    "row_linear_backward",
    "(Tensor dy, Tensor x, Tensor weight, Tensor trained, Tensor index, bool[] needs, bool columns, str backend)"
    " -> Tensor[]",
    _backward_implementation,
    _backward_fake,
)
_row_linear = register_op(
    "row_linear",
    "(Tensor x, Tensor weight, Tensor trained, Tensor index, Tensor bias, bool columns, str backend)"
    " -> (Tensor[], Tensor)",
    _implementation,
    _fake,
    _setup_context,
    _backward,
    _definition,
)


def row_linear(
    x: Tensor,
    weight: Tensor,
    trained: Tensor,
    index: Tensor,
    bias: Tensor | None = None,
    columns: bool = False,
    backend: str | None = None,
) -> Tensor:
    """``y = x Wᵀ + bias`` with a gradient for the rows (or columns) ``index`` of W alone (Yang et al., 2024).

    Args:
        x: the input ``[..., K]``, float16, bfloat16, float32 or float64, any strides.
        weight: W ``[N, K]`` in x's dtype, any strides, without a gradient. It must hold ``trained`` in its place
            already, rounded to its dtype: ``fastpeft.nn.RowSparseLinear`` sees to that.
        trained: the part of W that gets the gradient: ``[n, K]``, or ``[N, n]`` with ``columns``; in x's dtype or
            float32 (a float32 master of a 16-bit weight).
        index: ``[n]`` int64, the distinct numbers of its rows (columns) in W.
        bias: ``[N]`` in x's dtype, or None for none; it gets a gradient if it asks.
        columns: whether ``trained`` holds columns of W; else rows.
        backend: "cuda", "triton" or "reference", which then serves the call, or raises with the reason why it cannot.
            None takes the environment's ``FASTPEFT_BACKEND``, and without one the first of the three that can serve.

    Returns:
        ``[..., N]`` in x's dtype. Under autocast x, weight and bias are cast to autocast's dtype first.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value, or the backend asked for cannot serve the call.
            Every message names the op, the argument, what it is and what was expected.
    """
    _check.floating("row_linear", "x", x)
    wanted = autocast_dtype(x)
    if wanted is not None:
        x, weight, bias = x.to(wanted), cast(weight, wanted), cast(bias, wanted)
        trained = cast(trained, wanted, torch.float32)
    return _planned(x, weight, trained, index, bias, columns, backend)[0]


@planned
def _planned(x, weight, trained, index, bias, columns, backend):
    shape = x.shape
    _check_operands(x, weight, trained, index, bias, columns)
    backend = _backend.choose("row_linear", backend, REASONS, x, trained, columns)
    if not (trained.requires_grad and torch.is_grad_enabled()):
        return [F.linear(x, weight, bias)]
    flat = x if len(shape) == 2 else x.reshape(-1, shape[-1])
    (y,), _ = _row_linear(flat, weight, trained, index, x.new_empty(0) if bias is None else bias, columns, backend)
    return [y if len(shape) == 2 else y.reshape(*shape[:-1], y.shape[-1])]


def _check_operands(x, weight, trained, index, bias, columns):
    sizes = {"K": x.shape[-1]}
    _check.tensor("row_linear", "weight", weight, ("N", "K"), sizes, x)
    _check.dtype("row_linear", "weight", weight, x.dtype)
    if weight.requires_grad:
        raise ValueError("row_linear: weight requires a gradient, expected a frozen weight: only trained gets one")
    _check.boolean("row_linear", "columns", columns)
    _check.tensor("row_linear", "trained", trained, ("N", "n") if columns else ("n", "K"), sizes, x)
    _check.dtype("row_linear", "trained", trained, x.dtype, torch.promote_types(x.dtype, torch.float32))
    if not isinstance(index, Tensor) or index.dtype != torch.int64 or index.dim() != 1 or index.device != x.device:
        shape = f"{index.dtype} {list(index.shape)} on {index.device}" if isinstance(index, Tensor) else None
        given = shape or _check.shown(index)
        raise TypeError(f"row_linear: index is {given}, expected an int64 tensor [n] on {x.device}")
    if index.shape[0] != sizes["n"]:
        raise ValueError(f"row_linear: index has n={index.shape[0]}, expected n={sizes['n']}")
    if bias is not None:
        _check.tensor("row_linear", "bias", bias, ("N",), sizes, x)
        _check.dtype("row_linear", "bias", bias, x.dtype)


REASONS = {
    "cuda": lambda x, trained, columns: _backend.cuda_missing() or "fastpeft._C has no row_linear",
    "triton": lambda x, trained, columns: _backend.triton_lora_reason(x, trained.dtype, 0, 0),
    "reference": lambda x, trained, columns: None,
}


def facts(given: dict) -> tuple:
    """What ``REASONS`` look at, of the arguments of ``row_linear`` by name."""
    return given["x"], given["trained"], given.get("columns", False)
