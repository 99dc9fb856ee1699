"""Stand-ins in plain PyTorch for PyTorch's attention kernels of CUDA devices.

They demand of their arguments what those do, round where those round, and return what those return, down to the
leftovers: L filled up to 32 queries, and L = 0 where a query sees nothing.
"""

import math

import torch

from tests.support.backends import BF16, FP16, FP32

INF = math.inf


def demand(fact, what):
    if not fact:
        raise RuntimeError(what)


def demand_aligned(*tensors):
    for x in tensors:
        demand(x.stride(-1) == 1, f"last stride {x.stride(-1)}")
        steps = [*x.stride()[:-1], x.storage_offset()]
        demand(not any(step * x.itemsize % 16 for step in steps), f"strides and offset {steps} of {x.dtype}")


def weighed(q, k, v, bias, visible, scale):
    """O as a kernel rounds it, and L in float32; products take their operands in q's dtype."""
    s = q.float() @ k.float().mT * scale
    s = s if bias is None else s + bias.float()
    s = (s * math.log2(math.e)).masked_fill(~visible, -INF)  # in base 2: float32's lowest overflows
    top = s.amax(-1, keepdim=True)
    p = (s - top).exp2()
    total = p.sum(-1, keepdim=True)
    return ((p.to(q.dtype).float() @ v.float()) / total).to(q.dtype), ((top + total.log2()) / math.log2(math.e))[..., 0]


def gradients(dout, q, k, v, bias, visible, scale, out, lse):
    s = q.float() @ k.float().mT * scale
    s = s if bias is None else s + bias.float()
    p = (s - lse[..., None]).exp().masked_fill(~visible, 0)
    delta = (dout.float() * out.float()).sum(-1, keepdim=True)
    ds = (p * (dout.float() @ v.float().mT - delta)).to(q.dtype).float()
    found = ds @ k.float() * scale, ds.mT @ q.float() * scale, p.to(q.dtype).float().mT @ dout.float()
    return [t.to(q.dtype) for t in found]


def flash(q, k, v, dropout=0.0, causal=False, debug=False, *, scale=None):
    demand(q.dtype in (FP16, BF16), f"dtype {q.dtype}")
    demand(q.shape[-1] % 8 == 0 and q.shape[-1] <= 256, f"head size {q.shape[-1]}")
    demand(dropout == 0 and not debug and k.shape[2] > 0, "dropout, or no keys")
    demand_aligned(q, k, v)
    groups, (t, s) = q.shape[1] // k.shape[1], (q.shape[2], k.shape[2])
    visible = torch.ones(t, s, dtype=torch.bool).tril(s - t if causal else s)  # the last query sees the last key
    out, lse = weighed(q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), None, visible, scale)
    random = torch.empty(2, dtype=torch.uint64), torch.empty((), dtype=torch.uint64)
    return torch.empty_like(q).copy_(out), lse, None, None, t, s, *random, torch.empty(0, dtype=q.dtype)


def flash_backward(dout, q, k, v, out, lse, cq, ck, max_q, max_k, dropout, causal, seed, offset, *, scale=None):
    demand(cq is None and ck is None and (max_q, max_k) == (q.shape[2], k.shape[2]) and dropout == 0, "sizes")
    demand(seed.shape == (2,) and offset.shape == () and seed.dtype == offset.dtype == torch.uint64, "seed")
    demand(lse.shape == q.shape[:3] and lse.is_contiguous() and lse.dtype == FP32, "L")
    demand(dout.dtype == out.dtype == q.dtype, "dtypes")
    demand_aligned(dout, q, k, v, out)
    groups, (t, s) = q.shape[1] // k.shape[1], (q.shape[2], k.shape[2])
    visible = torch.ones(t, s, dtype=torch.bool).tril(s - t if causal else s)
    wide = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    dq, dk, dv = gradients(dout, q, *wide, None, visible, scale, out, lse)
    return dq, *(x.unflatten(1, (-1, groups)).float().sum(2).to(q.dtype) for x in (dk, dv))


def demand_bias(bias, q, k):
    if bias is not None:
        demand(bias.dtype == q.dtype and bias.shape == (*q.shape[:3], k.shape[2]), f"bias {bias.shape} {bias.dtype}")
        demand_aligned(bias)
        last = sum((n - 1) * step for n, step in zip(bias.shape[:3], bias.stride(), strict=False))
        end = bias.storage_offset() + last + -(-k.shape[2] // 16) * 16
        demand(end * bias.itemsize <= bias.untyped_storage().nbytes(), "memory behind the bias is not its own")


def efficient(q, k, v, bias, compute_lse, dropout=0.0, causal=False, *, scale=None):
    demand(q.shape[1] == k.shape[1] and compute_lse and dropout == 0, "heads")
    demand(q.shape[-1] * q.itemsize % 16 == 0, f"head size {q.shape[-1]}")
    demand_aligned(q, k, v)
    demand_bias(bias, q, k)
    visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(0 if causal else k.shape[2])
    out, lse = weighed(q, k, v, bias, visible, scale)  # out is NaN where a query sees nothing
    lse = torch.nn.functional.pad(torch.where(lse.isnan(), 0, lse), (0, -q.shape[2] % 32), value=INF)
    inside = torch.empty_like(out.transpose(1, 2).contiguous()).transpose(1, 2).copy_(out)
    return inside, lse, torch.empty((), dtype=torch.int64), torch.empty((), dtype=torch.int64)


def efficient_backward(dout, q, k, v, bias, out, lse, seed, offset, dropout, mask, causal=False, *, scale=None):
    t = q.shape[2]
    demand(seed.shape == offset.shape == () and seed.dtype == offset.dtype == torch.int64, "seed")
    demand(lse.shape == (*q.shape[:2], -(-t // 32) * 32) and lse.is_contiguous() and lse.dtype == FP32, "L")
    demand(lse[..., t:].eq(INF).all() and lse[..., :t].isfinite().all(), "values of L")
    demand(out.transpose(1, 2).is_contiguous(), f"strides {out.stride()} of O")
    demand(list(mask) == [True, True, True, False] and dropout == 0, "what to compute")
    demand_aligned(dout, q, k, v, out)
    demand_bias(bias, q, k)
    visible = torch.ones(t, k.shape[2], dtype=torch.bool).tril(0 if causal else k.shape[2])
    return *gradients(dout, q, k, v, bias, visible, scale, out, lse[..., :t]), None
