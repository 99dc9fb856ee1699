"""LoRA around a frozen embedding, fused.

    y = E[ids] + S Bᵀ                 S  = scale · A[:, ids]ᵀ                 saved for backward: ids and S
    dS = scale · dY B                 dB = dYᵀ S                              one read of dY
    dA[:, ids] = Σ dSᵀ                over the places of an id, in their order; 0 elsewhere

The sum is rounded once, where PyTorch's chain of operators writes the low-rank term, its multiple and the sum in the
adapters' dtype, each as large as y. Every step is deterministic. Source: Hu et al., "LoRA: Low-Rank Adaptation of Large
Language Models" (2021).
"""

import torch
from torch import Tensor

from .. import _backend, _check, reference
from .._library import register_op


def _implementation(ids, table, lora_a, lora_b, scale, padding, backend):
    s = lora_a.T.index_select(0, ids).mul_(scale)
    return [_backend.load("lora_embedding", backend).forward(ids, table, s, lora_b)], s


def _fake(ids, table, lora_a, lora_b, scale, padding, backend):
    like = table if table.numel() else lora_b
    return [like.new_empty(ids.shape[0], lora_b.shape[0])], lora_a.new_empty(ids.shape[0], lora_a.shape[0])


def _setup_context(ctx, inputs, output):
    ids, _, lora_a, lora_b, scale, padding, backend = inputs
    ctx.needs = [lora_a.requires_grad, lora_b.requires_grad]
    ctx.save_for_backward(ids, output[1] if ctx.needs[1] else lora_b.new_empty(0), lora_a, lora_b)
    ctx.settings = scale, padding, backend


def _backward(ctx, grads, _):
    da, db = _lora_embedding_backward(grads[0], *ctx.saved_tensors, ctx.needs, *ctx.settings)
    need_da, need_db = ctx.needs
    return None, None, da if need_da else None, db if need_db else None, None, None, None


def _definition(ctx, grads):
    ids, _, lora_a, lora_b = ctx.saved_tensors
    scale, padding, _ = ctx.settings
    dtype = grads[0].dtype

    def outputs(_, __, lora_a, lora_b, *___):
        low = reference.lora_embedding(ids, None, lora_a, lora_b, scale, padding if padding >= 0 else None)
        return [low.to(dtype)]

    return (None, None, lora_a, lora_b, None, None, None), outputs


def _backward_implementation(dy, ids, s, lora_a, lora_b, needs, scale, padding, backend):
    """``[dA, dB]``; what is not needed is an empty tensor."""
    impl = _backend.load("lora_embedding", backend)
    ds, db = impl.backward(dy, s, lora_b, scale, *needs)
    da = None
    if ds is not None:  # PyTorch sorts the ids, and adds in order
        da = torch.ops.aten.embedding_dense_backward(ds, ids, lora_a.shape[1], padding, False).T.contiguous()
    return [dy.new_empty(0) if grad is None else grad for grad in (da, db)]


def _backward_fake(dy, ids, s, lora_a, lora_b, needs, scale, padding, backend):
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format) if need else dy.new_empty(0)
        for t, need in zip((lora_a, lora_b), needs, strict=True)
    ]


_lora_embedding_backward = register_op(
    "lora_embedding_backward",
    "(Tensor dy, Tensor ids, Tensor s, Tensor lora_a, Tensor lora_b, bool[] needs, float scale, int padding, "
    "str backend) -> Tensor[]",
    _backward_implementation,
    _backward_fake,
)
_lora_embedding = register_op(
    "lora_embedding",
    "(Tensor ids, Tensor table, Tensor lora_a, Tensor lora_b, float scale, int padding, str backend)"
    " -> (Tensor[], Tensor)",
    _implementation,
    _fake,
    _setup_context,
    _backward,
    _definition,
)


def lora_embedding(
    ids: Tensor,
    table: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float = 1.0,
    padding_idx: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """``y = E[ids] + scale · A[:, ids]ᵀ Bᵀ`` (Hu et al., 2021).

    Args:
        ids: token ids ``[...]``, int64 or int32, any strides.
        table: E ``[V, D]``, frozen, float16, bfloat16, float32 or float64; or None for the low-rank term alone, in A's
            dtype.
        lora_a: A ``[r, V]``, in the table's dtype or float32. Its gradient is 0 but in the columns of the ids.
        lora_b: B ``[D, r]`` in lora_a's dtype.
        scale: factor of the low-rank term, without a unit.
        padding_idx: the id of whose column A gets no gradient; None: there is no such id.
        backend: "cuda", "triton" or "reference", which then serves the call, or raises with the reason why it cannot.
            None takes the environment's ``FASTPEFT_BACKEND``, and without one the first of the three that can serve.

    Returns:
        ``[..., D]`` in the table's dtype, under autocast too, as PyTorch's embedding gives it.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value, or the backend asked for cannot serve the call.
            Every message names the op, the argument, what it is and what was expected.
        IndexError: an id is outside of A's columns, on a CPU; on a GPU PyTorch's assertion ends the process.
    """
    op = "lora_embedding"
    _check.floating(op, "lora_a", lora_a)
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32) or ids.device != lora_a.device:
        given = f"{ids.dtype} on {ids.device}" if isinstance(ids, Tensor) else _check.shown(ids)
        raise TypeError(f"{op}: ids is {given}, expected an int64 or int32 tensor on {lora_a.device}")
    sizes: dict[str, int] = {}
    _check.tensor(op, "lora_a", lora_a, ("r", "V"), sizes, lora_a)
    _check.tensor(op, "lora_b", lora_b, ("D", "r"), sizes, lora_a)
    _check.dtype(op, "lora_b", lora_b, lora_a.dtype)
    if sizes["r"] == 0:
        raise ValueError(f"{op}: lora_a has r=0, expected r>=1")
    if table is not None:
        _check.tensor(op, "table", table, ("V", "D"), sizes, lora_a)
        _check.dtype(op, "lora_a", lora_a, table.dtype, torch.promote_types(table.dtype, torch.float32))
        if table.requires_grad:
            raise ValueError(f"{op}: table requires a gradient, expected a frozen one")
    scale = _check.finite(op, "scale", scale)
    padding = -1
    if padding_idx is not None:
        padding = _check.integer(op, "padding_idx", padding_idx)
        if not 0 <= padding < sizes["V"]:
            raise ValueError(f"{op}: padding_idx is {padding}, expected 0 ... {sizes['V'] - 1}")
    backend = _backend.choose(op, backend, REASONS, lora_a if table is None else table, lora_a)
    empty = lora_a.new_empty(0) if table is None else table
    (y,), _ = _lora_embedding(ids.reshape(-1).long(), empty, lora_a, lora_b, scale, padding, backend)
    return y.view(*ids.shape, y.shape[-1])


REASONS = {
    "cuda": lambda table, lora_a: _backend.cuda_missing() or "fastpeft._C has no lora_embedding",
    "triton": lambda table, lora_a: _backend.triton_lora_reason(table, lora_a.dtype, lora_a.shape[0], 256),
    "reference": lambda table, lora_a: None,
}


def facts(given: dict) -> tuple:
    """What ``REASONS`` look at, of the arguments of ``lora_embedding`` by name."""
    table = given.get("table")
    return given["lora_a"] if table is None else table, given["lora_a"]
