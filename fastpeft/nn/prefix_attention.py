"""Attention to a prefix that a whole batch shares, beside the model's own, merged by log-sum-exp.

    O = O_s + w (O_p - O_s),    w = sigmoid(L_p - L_s),    L = log(exp L_s + exp L_p)

O_s and L_s are the output and the log-sum-exp of the scores of each query's own keys, O_p and L_p those of the prefix,
whose keys ``[Hkv, P, D]`` the queries of all rows read where they lie: the prefix is never repeated for a row. Backward
needs O and L alone beside the inputs: with them, the gradients of either part are those of ordinary attention to it,
``dS = P ∘ (dO Vᵀ - rowsum(dO ∘ O))`` with ``P = exp(S - L)``. prefix_attention_kernels.py has what computes a part.

Source: the prefix is Li & Liang, "Prefix-Tuning" (2021); the merge is that of Dao et al., "FlashAttention" (2022),
between blocks, used between cascades by Juravsky et al., "Hydragen" (2024).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import prefix_attention_kernels as kernels

# One prefix: keys and values [Hkv, P, D], and which rows have it (int64), or None for all.
Prefix = tuple[Tensor, Tensor, Tensor | None]


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefixes: Sequence[Prefix],
    mask: Tensor | None,
    causal: bool,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """Attention of ``q [B, H, T, D]`` to ``k, v [B, Hkv, S, D]`` and to its row's prefix: ``[B, H, T, D]``.

    Args:
        prefixes: no row may have two; a row may have none.
        mask: of the row's own keys, broadcast over ``[B, H, T, S]``: True where a query sees a key, or added to the
            scores. Every query sees the whole prefix.
        causal: without a mask: query t sees keys up to t.
        dropout: of the weights; the scores are then kept for backward, as eager attention does.
    """
    tensors = [t for key, value, _ in prefixes for t in (key.to(q.dtype), value.to(q.dtype))]
    rows = [which for *_, which in prefixes]
    if dropout:
        return _explicit(q, k, v, tensors, rows, mask, causal, scale, dropout)
    return _PrefixAttention.apply(q, k, v, mask, causal, scale, rows, *tensors)


class _PrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, mask, causal, scale, rows, *prefixes):
        out, lse = kernels.choose(q, k, v, mask, causal).attend(q, k, v, mask, causal, scale)
        for (key, value), which in zip(_pairs(prefixes), rows, strict=True):
            mine, key, value = _taken(q, which), key.unsqueeze(0), value.unsqueeze(0)
            part = kernels.choose(mine, key, value, None, False).attend(mine, key, value, None, False, scale)
            merged, total = _merged(_taken(out, which), _taken(lse, which), *part)
            out = merged if which is None else out.index_copy_(0, which, merged)
            lse = total if which is None else lse.index_copy_(0, which, total)
        out = out.to(q.dtype)
        lse = lse.masked_fill(lse == -torch.inf, 0)  # of a query that sees nothing: exp(-inf - 0) = 0 in backward
        ctx.save_for_backward(q, k, v, out, lse, *prefixes)
        ctx.mask, ctx.settings = mask, (causal, scale, rows)
        return out

    @staticmethod
    def backward(ctx, dout):
        (q, k, v, out, lse, *prefixes), mask, (causal, scale, rows) = ctx.saved_tensors, ctx.mask, ctx.settings
        if torch.is_grad_enabled():  # gradients that are differentiated themselves: autograd's, of scores that exist
            inputs = [t.view_as(t) for t in (q, k, v, *prefixes)]  # aliases: none is a function of another
            asked = [t for t in inputs if t.requires_grad]
            ys = _explicit(inputs[0], inputs[1], inputs[2], inputs[3:], rows, mask, causal, scale, 0.0)
            found = iter(torch.autograd.grad(ys, asked, dout, create_graph=True, materialize_grads=True))
            dq, dk, dv, *rest = [next(found) if t.requires_grad else None for t in inputs]
            return dq, dk, dv, None, None, None, None, *rest
        dout, out = kernels.heads_inside(dout), kernels.heads_inside(out)  # once, where every part's kernel would
        kernel = kernels.choose(q, k, v, mask, causal)
        dq, dk, dv = kernel.backward(dout, q, k, v, mask, causal, scale, out, lse)
        grads: list[Tensor] = []
        for (key, value), which in zip(_pairs(prefixes), rows, strict=True):
            d, mine, o, lse_ = (_taken(t, which) for t in (dout, q, out, lse))
            key, value = key.unsqueeze(0), value.unsqueeze(0)
            kernel = kernels.choose(mine, key, value, None, False)
            part, dkey, dvalue = kernel.backward(d, mine, key, value, None, False, scale, o, lse_)
            part = _taken(dq, which).add_(part)
            dq = part if which is None else dq.index_copy_(0, which, part)
            grads += [dkey.squeeze(0), dvalue.squeeze(0)]
        return dq, dk, dv, None, None, None, None, *grads


def _pairs(prefixes: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(prefixes[::2], prefixes[1::2], strict=True))


def _taken(x: Tensor, which: Tensor | None) -> Tensor:
    return x if which is None else x.index_select(0, which)


def _merged(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    """O and L of both parts' keys together; O in place. Parts in 16 bits are merged in float32 and rounded once."""
    weight = torch.sigmoid(part_lse - lse).unsqueeze(-1)
    if out.dtype == part.dtype == weight.dtype:
        out.lerp_(part, weight)
    else:
        torch.addcmul(part * weight, out, torch.sigmoid(lse - part_lse).unsqueeze(-1), out=out)
    return out, torch.logaddexp(lse, part_lse)


def _explicit(q, k, v, prefixes, rows, mask, causal, scale, dropout) -> Tensor:
    """The same by scores that exist, for dropout of the weights."""
    scores = kernels.scores(q, k, mask, causal, scale)
    values = kernels.repeated(v, q)
    out = torch.zeros_like(q)
    pairs: list[tuple] = list(zip(_pairs(prefixes), rows, strict=True))
    covered = [r for _, r in pairs if r is not None]
    if all(r is not None for _, r in pairs):
        rest = torch.ones(len(q), dtype=torch.bool, device=q.device)
        for which in covered:
            rest[which] = False
        pairs.append(((None, None), rest.nonzero()[:, 0]))
    for (key, value), which in pairs:
        mine = torch.arange(len(q), device=q.device) if which is None else which
        parts = [scores[mine]]
        if key is not None:
            shared = (kernels.packed(q[mine], key[None]) @ key[None].mT).to(scores.dtype) * scale
            parts.append(kernels.unpacked(shared, q[mine]))
        weights = torch.dropout(torch.cat(parts, -1).softmax(-1), dropout, True).to(q.dtype)
        found = weights[..., : k.shape[2]] @ values[mine]
        if key is not None:
            shared = kernels.packed(weights[..., k.shape[2] :], key[None]) @ value[None]
            found = found + kernels.unpacked(shared, q[mine])
        out = out.index_add(0, mine, found)
    return out
