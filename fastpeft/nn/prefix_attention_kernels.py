"""The attention kernels of PyTorch that return the log-sum-exp of the scores too, and which of them serves a call.

    attend(q, k, v, mask, causal, scale)                      ->  O, L
    backward(dO, q, k, v, mask, causal, scale, O, L)          ->  dq, dk, dv

q and O are ``[B, H, T, D]``; k and v ``[B, Hkv, S, D]``, or ``[1, Hkv, S, D]`` of keys that all rows share, which come
without a mask; L is ``[B, H, T]``, float32 or wider. ``attend`` gives a query that sees no key O = 0 and L = -inf.
``backward`` may be given O and L of more keys than k, and then gives this part's share of the gradients; there L is
finite. As everywhere in PyTorch, the kernels for CUDA devices give the same bits every time only under
``torch.use_deterministic_algorithms(True)``.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_FLASH = torch.ops.aten._scaled_dot_product_flash_attention
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_backward
_EFFICIENT = torch.ops.aten._scaled_dot_product_efficient_attention
_EFFICIENT_BACKWARD = torch.ops.aten._scaled_dot_product_efficient_attention_backward
_CPU_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_CPU_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# The efficient kernel multiplies scores by log2(e): what is added below float32's lowest / log2(e) overflows to -inf.
_LOWEST = -1e38


class Kernel(NamedTuple):
    """One way of computing attention; ``reason(q, k, v, mask, causal)`` says why it cannot, or is None."""

    name: str
    reason: Callable[..., str | None]
    attend: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def choose(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Kernel:
    """The first that can; it depends on device, dtypes and sizes alone."""
    return next(kernel for kernel in KERNELS if kernel.reason(q, k, v, mask, causal) is None)


def _flash_reason(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> str | None:
    d, queries, keys = q.shape[-1], q.shape[2], k.shape[2]
    if mask is not None:
        return "a mask"
    if causal and queries != keys:
        return f"causal with {queries} queries and {keys} keys, whose last ones it aligns"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"dtype {q.dtype}"
    if d % 8 or d > 256 or 192 < d <= 224:  # of the last, some devices have no backward
        return f"head size {d}"
    return _unlike(q, k, v) or _no_gpu(q.device)


def _efficient_reason(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> str | None:
    d = q.shape[-1]
    if mask is not None and mask.dtype not in (torch.bool, q.dtype):
        return f"a mask in {mask.dtype} beside {q.dtype}, to which it would be rounded"
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"dtype {q.dtype}"
    if d * q.itemsize % 16:
        return f"head size {d}"
    return _unlike(q, k, v) or _no_gpu(q.device)


def _cpu_flash_reason(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> str | None:
    return _unlike(q, k, v) or (None if q.device.type == "cpu" else f"device {q.device.type}")


def _unlike(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    if not q.shape[-1] == k.shape[-1] == v.shape[-1]:
        return f"head sizes {q.shape[-1]}, {k.shape[-1]} and {v.shape[-1]}"
    if not q.dtype == k.dtype == v.dtype:
        return f"dtypes {q.dtype}, {k.dtype} and {v.dtype}"
    return None if q.numel() and k.numel() else "nothing to attend to"


def _no_gpu(device: torch.device) -> str | None:
    if device.type != "cuda" or torch.version.hip:
        return "ROCm, whose L has another layout" if torch.version.hip else f"device {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor} < sm_80" if major < 8 else None


def _flash(q, k, v, mask, causal, scale):
    """Grouped heads are the kernel's own business."""
    out, lse, *_ = _FLASH(*map(_aligned, (q, *_expanded(q, k, v))), 0.0, causal, scale=scale)
    return out, lse


def _flash_backward(dout, q, k, v, mask, causal, scale, out, lse):
    random = q.new_empty(2, dtype=torch.uint64), q.new_empty((), dtype=torch.uint64)  # read where there is dropout
    inputs = map(_aligned, (heads_inside(dout), q, *_expanded(q, k, v), heads_inside(out)))
    sizes = q.shape[2], k.shape[2]
    dq, dk, dv = _FLASH_BACKWARD(*inputs, lse.contiguous(), None, None, *sizes, 0.0, causal, *random, scale=scale)
    return dq, _summed(dk, k), _summed(dv, v)


def _efficient(q, k, v, mask, causal, scale):
    wide = _expanded(q, repeated(k, q), repeated(v, q))
    bias = None if mask is None else _bias(mask, q, k)
    out, lse, *_ = _EFFICIENT(*map(_aligned, (q, *wide)), bias, True, 0.0, causal, scale=scale)
    lse = lse.narrow(2, 0, q.shape[2])  # the kernel fills it up to a multiple of 32
    if mask is not None:
        # Where a query sees nothing the kernel's L is 0, as if it saw one key.
        blind = (mask if mask.dtype == torch.bool else mask > _LOWEST).any(-1).logical_not_()
        out, lse = out.masked_fill(blind.unsqueeze(-1), 0), lse.masked_fill(blind, -torch.inf)
    return out, lse


def _efficient_backward(dout, q, k, v, mask, causal, scale, out, lse):
    random = torch.empty((), dtype=torch.int64), torch.empty((), dtype=torch.int64)  # read where there is dropout
    wide = _expanded(q, repeated(k, q), repeated(v, q))
    bias = None if mask is None else _bias(mask, q, k)
    lse = F.pad(lse, (0, -q.shape[2] % 32), value=torch.inf).contiguous()  # beyond the queries, exp(S - L) is 0
    dout, q, wide_k, wide_v, out = map(_aligned, (heads_inside(dout), q, *wide, heads_inside(out)))
    given = dout, q, wide_k, wide_v, bias, out, lse
    dq, dk, dv, _ = _EFFICIENT_BACKWARD(*given, *random, 0.0, [True, True, True, False], causal, scale=scale)
    return dq, _summed(dk, k), _summed(dv, v)


def _bias(mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """``[B, H, T, S]``; memory ``[.., T, S]`` of whole multiples of 16 keys, which the kernel reads."""
    keys = k.shape[2]
    bias = added(mask, q).expand(*mask.shape[:-1], keys)
    bias = F.pad(bias, (0, -keys % 16)) if keys % 16 else bias
    return _aligned(bias).narrow(-1, 0, keys).expand(*q.shape[:3], keys)


def _cpu_flash(q, k, v, mask, causal, scale):
    """16-bit inputs in float32, so that their part is not rounded before it is merged."""
    q, k, v = _wide(q, k, v)
    bias = None if mask is None else added(mask, q).to(q.dtype)
    out, lse = _CPU_FLASH(q, *_expanded(q, repeated(k, q), repeated(v, q)), 0.0, causal, attn_mask=bias, scale=scale)
    if bias is not None:
        lse = lse.masked_fill((bias == -torch.inf).all(-1), -torch.inf)
    return out, lse


def _cpu_flash_backward(dout, q, k, v, mask, causal, scale, out, lse):
    dout, out, wide_q, wide_k, wide_v = _wide(dout, out, q, k, v)
    keys = _expanded(q, repeated(wide_k, q), repeated(wide_v, q))
    bias = None if mask is None else added(mask, wide_q).to(wide_q.dtype)
    given = dout, wide_q, *keys, out, lse
    dq, dk, dv = _CPU_FLASH_BACKWARD(*given, 0.0, causal, attn_mask=bias, scale=scale)
    return dq.to(q.dtype), _summed(dk, k), _summed(dv, v)


def _explicit(q, k, v, mask, causal, scale):
    if len(k) < len(q):
        out, lse = _explicit(packed(q, k), k, v, mask, causal, scale)
        return unpacked(out, q), unpacked(lse.unsqueeze(-1), q).squeeze(-1)
    weights = scores(q, k, mask, causal, scale)
    lse = weights.logsumexp(-1)
    weights = weights.sub_(lse.masked_fill(lse == -torch.inf, 0).unsqueeze(-1)).exp_()
    return weights @ repeated(v, q).to(weights.dtype), lse


def _explicit_backward(dout, q, k, v, mask, causal, scale, out, lse):
    """``dS = P ∘ (dO Vᵀ - rowsum(dO ∘ O))`` with ``P = exp(S - L)``."""
    if len(k) < len(q):
        rest = packed(out, k), packed(lse.unsqueeze(-1), k).squeeze(-1)
        dq, dk, dv = _explicit_backward(packed(dout, k), packed(q, k), k, v, mask, causal, scale, *rest)
        return unpacked(dq, q), dk, dv
    weights = scores(q, k, mask, causal, scale).sub_(lse.unsqueeze(-1)).exp_()
    acc = weights.dtype
    wide = dout.to(acc)
    dv = weights.mT @ wide
    delta = (wide * out.to(acc)).sum(-1, keepdim=True)
    ds = weights * (wide @ repeated(v, q).to(acc).mT - delta) * scale
    dq, dk = ds @ repeated(k, q).to(acc), ds.mT @ q.to(acc)
    return dq.to(q.dtype), _summed(dk, k), _summed(dv, v)


def scores(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """``[B, H, T, S]`` in float32, or float64 of float64."""
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    found = q.to(acc) @ repeated(k, q).to(acc).mT * scale
    if causal:
        found = found.masked_fill(torch.ones_like(found, dtype=torch.bool).triu(1), -torch.inf)
    return found if mask is None else found + added(mask, q).to(acc)


def added(mask: Tensor, q: Tensor) -> Tensor:
    """What a mask adds to the scores."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask.logical_not(), -torch.inf)


def repeated(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values of grouped heads, for each of q's heads."""
    groups = q.shape[1] // x.shape[1]
    return x if groups == 1 else x.repeat_interleave(groups, 1)


def packed(x: Tensor, k: Tensor) -> Tensor:
    """Queries of all rows and of all heads of a group, ``[1, Hkv, G B T, D]``, so that one product reads shared keys
    once."""
    b, h, t, d = x.shape
    heads = k.shape[1]
    return x.reshape(b, heads, h // heads, t, d).permute(1, 2, 0, 3, 4).reshape(1, heads, -1, d)


def unpacked(x: Tensor, like: Tensor) -> Tensor:
    """The way back: ``[B, H, T, D]``."""
    b, h, t, _ = like.shape
    heads, d = x.shape[1], x.shape[3]
    return x.view(heads, h // heads, b, t, d).permute(2, 0, 1, 3, 4).reshape(b, h, t, d)


def _wide(*tensors: Tensor) -> list[Tensor]:
    return [t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]


def _expanded(q: Tensor, *shared: Tensor) -> list[Tensor]:
    """Keys and values for as many rows as q has, without a copy."""
    return [t.expand(len(q), -1, -1, -1) for t in shared]


def _aligned(x: Tensor) -> Tensor:
    """As kernels of CUDA devices read it: features adjacent, every vector of them at a multiple of 16 bytes."""
    steps = *x.stride()[:-1], x.storage_offset()
    fits = x.stride(-1) == 1 and not any(step * x.itemsize % 16 for step in steps)
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def heads_inside(x: Tensor) -> Tensor:
    """In memory ``[B, T, H, D]``: the only layout of O and dO that backward kernels read without a copy, or at all."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _summed(grad: Tensor, like: Tensor) -> Tensor:
    """Of keys or values: over the heads of a group and, of shared ones, over the rows; rounded once."""
    grouped = grad.unflatten(1, (like.shape[1], -1))
    over = [dim for dim, n in ((0, len(like)), (2, 1)) if grouped.shape[dim] != n]
    return (grouped.sum(over).reshape(like.shape) if over else grad).to(like.dtype)


KERNELS = (
    Kernel("flash", _flash_reason, _flash, _flash_backward),
    Kernel("efficient", _efficient_reason, _efficient, _efficient_backward),
    Kernel("CPU flash", _cpu_flash_reason, _cpu_flash, _cpu_flash_backward),
    Kernel("explicit scores", lambda q, k, v, mask, causal: None, _explicit, _explicit_backward),
)
