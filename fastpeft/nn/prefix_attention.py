"""Attention to a prefix that a whole batch shares, beside the model's own, merged by log-sum-exp.

    O = O_s + w (O_p - O_s),    w = sigmoid(L_p - L_s),    L = log(exp L_s + exp L_p)

O_s and L_s are the output and the log-sum-exp of the scores of each query's own keys, O_p and L_p those of the prefix,
whose keys ``[Hkv, P, D]`` are read once by the queries of all rows (of all heads of a group, with grouped queries): the
prefix is never repeated for a row. Backward needs O and L alone beside the inputs: with them, the gradients of either
part are those of ordinary attention to it, ``dS = P ∘ (dO Vᵀ - rowsum(dO ∘ O))`` with ``P = exp(S - L)``.

Source: the prefix is Li & Liang, "Prefix-Tuning" (2021); the merge is that of Dao et al., "FlashAttention" (2022),
between blocks, used between cascades by Juravsky et al., "Hydragen" (2024).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

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
        out, lse = _attend(q, k, v, mask, causal, scale)
        for (key, value), which in zip(_pairs(prefixes), rows, strict=True):
            mine = slice(None) if which is None else which
            own = _flash(q[mine], key[None], value[None])
            shared = _shared(q[mine], key, own)
            part, part_lse = _attend(shared, *_seen((key, value), shared), None, False, scale)
            part, part_lse = _rows(part, q[mine], own), _rows(part_lse[..., None], q[mine], own)[..., 0]
            weight = torch.sigmoid(part_lse - lse[mine])[..., None]
            merged, total = torch.lerp(out[mine], part, weight), torch.logaddexp(lse[mine], part_lse)
            if which is None:
                out, lse = merged, total
            else:
                out[which], lse[which] = merged, total
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse, *prefixes)
        ctx.mask, ctx.settings = mask, (causal, scale, rows)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        (q, k, v, out, lse, *prefixes), (causal, scale, rows) = ctx.saved_tensors, ctx.settings
        dq, dk, dv = _attend_backward(dout, q, k, v, ctx.mask, causal, scale, out, lse)
        grads = []
        for (key, value), which in zip(_pairs(prefixes), rows, strict=True):
            mine = slice(None) if which is None else which
            own = _flash(q[mine], key[None], value[None])
            d, shared, o, lse_ = (_shared(t[mine], key, own) for t in (dout, q, out, lse[..., None]))
            part = _attend_backward(
                d, shared, *_seen((key, value), shared), None, False, scale, o, lse_[..., 0].contiguous()
            )
            dq[mine] += _rows(part[0], q[mine], own)
            grads += [t.sum(0) for t in part[1:]]
        return dq, dk, dv, None, None, None, None, *grads


def _pairs(prefixes: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(prefixes[::2], prefixes[1::2], strict=True))


def _shared(x: Tensor, key: Tensor, own: bool) -> Tensor:
    """``[B, H, T, D]`` as queries of the prefix: of all rows at once, ``[1, Hkv, G B T, D]``, so that one product reads
    it once; or, where every row's program reads it where it lies, of each row, ``[B, Hkv, G T, D]``."""
    b, h, t, d = x.shape
    if own:
        return x.reshape(b, len(key), -1, d)
    return x.reshape(b, len(key), h // len(key), t, d).permute(1, 2, 0, 3, 4).reshape(1, len(key), -1, d)


def _rows(x: Tensor, like: Tensor, own: bool) -> Tensor:
    """The way back: ``[B, H, T, D]``."""
    b, h, t, _ = like.shape
    heads, d = x.shape[1], x.shape[3]
    if own:
        return x.reshape(b, h, t, d)
    return x.view(heads, h // heads, b, t, d).permute(2, 0, 1, 3, 4).reshape(b, h, t, d)


def _seen(prefix: Sequence[Tensor], shared: Tensor) -> list[Tensor]:
    """Keys and values for as many rows as the queries have, without a copy."""
    return [t.expand(len(shared), -1, -1, -1) for t in prefix]


def _flash(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether PyTorch's attention for CPUs, which returns L too, serves this call; else scores are computed twice.

    Of 16-bit inputs it returns a rounded part, which the merge would round again.
    """
    wide = q.device.type == "cpu" and q.dtype.itemsize > 2
    return wide and q.shape[-1] == k.shape[-1] == v.shape[-1] and q.numel() > 0 and k.numel() > 0


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Attention, not yet rounded to 16 bits, and the log-sum-exp of its scores ``[B, H, T]``, -inf where none is."""
    k, v = _repeated(k, q), _repeated(v, q)
    if _flash(q, k, v):
        added = _added(mask, q)
        out, lse = _FLASH(q, k, v, 0.0, causal, attn_mask=added, scale=scale)
        if added is not None:
            blind = (added == -torch.inf).all(-1)
            lse = lse.masked_fill(blind.expand_as(lse), -torch.inf)
        return out, lse
    scores = _scores(q, k, mask, causal, scale)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp()
    return weights @ v.to(weights.dtype), lse


def _attend_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of this part, given O and L of all parts together."""
    groups = q.shape[1] // k.shape[1]
    wide_k, wide_v = _repeated(k, q), _repeated(v, q)
    if _flash(q, k, v):
        dq, dk, dv = _FLASH_BACKWARD(
            dout, q, wide_k, wide_v, out, lse, 0.0, causal, attn_mask=_added(mask, q), scale=scale
        )
    else:
        weights = (_scores(q, wide_k, mask, causal, scale) - lse[..., None]).exp()
        acc = weights.dtype
        wide = dout.to(acc)
        dv = (weights.mT @ wide).to(v.dtype)
        delta = (wide * out.to(acc)).sum(-1, keepdim=True)
        ds = weights * (wide @ wide_v.to(acc).mT - delta) * scale
        dq, dk = (ds @ wide_k.to(acc)).to(q.dtype), (ds.mT @ q.to(acc)).to(k.dtype)
    if groups > 1:
        dk, dv = (t.unflatten(1, (-1, groups)).sum(2) for t in (dk, dv))
    return dq, dk, dv


def _explicit(q, k, v, prefixes, rows, mask, causal, scale, dropout) -> Tensor:
    """The same by scores that exist, for dropout of the weights."""
    scores = _scores(q, _repeated(k, q), mask, causal, scale)
    values = _repeated(v, q)
    out = torch.zeros_like(q)
    pairs = list(zip(_pairs(prefixes), rows, strict=True))
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
            shared = (_shared(q[mine], key, False) @ key[None].mT).to(scores.dtype) * scale
            parts.append(_rows(shared, q[mine], False))
        weights = torch.dropout(torch.cat(parts, -1).softmax(-1), dropout, True).to(q.dtype)
        found = weights[..., : k.shape[2]] @ values[mine]
        if key is not None:
            found = found + _rows(_shared(weights[..., k.shape[2] :], key, False) @ value[None], q[mine], False)
        out = out.index_add(0, mine, found)
    return out


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = q.to(acc) @ k.to(acc).mT * scale
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    added = _added(mask, q)
    return scores if added is None else scores + added.to(acc)


def _added(mask: Tensor | None, q: Tensor) -> Tensor | None:
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -torch.inf)


def _repeated(x: Tensor, q: Tensor) -> Tensor:
    groups = q.shape[1] // x.shape[1]
    return x if groups == 1 else x.repeat_interleave(groups, 1)
