"""Attention to a shared prefix: operands, the definition with the prefix in front of every row, and its gradients."""

import torch

from tests.support.backends import DEVICE, FP64

B, H, T, D = 3, 4, 6, 8
LENGTHS = (5, 2)
ALL, SOME, APART = "all rows", "two rows", "a different one each"
MASKS = ("none", "causal", "bool", "added")


def operands(dtype=FP64, heads=2, keys=7, who=ALL, mask="none", T=T, D=D):
    generator = torch.Generator().manual_seed(0)

    def new(*size):
        drawn = torch.randn(size, generator=generator, dtype=FP64)
        return drawn.to(DEVICE, dtype).requires_grad_()

    rows = {ALL: [None], SOME: [[0, 2]], APART: [[2], [1]]}[who]
    rows = [None if which is None else torch.tensor(which, device=DEVICE) for which in rows]
    prefixes = [(new(heads, p, D), new(heads, p, D), which) for p, which in zip(LENGTHS, rows, strict=False)]
    sees = torch.rand(B, 1, T, keys, generator=generator) > 0.4
    sees[:, :, :, 0] = True
    if who == ALL:
        sees[0, 0, 1] = False  # a query that sees the prefix alone
    added = torch.randn(B, 1, T, keys, generator=generator, dtype=FP64).to(dtype)
    mask_ = {"bool": sees.to(DEVICE), "added": added.to(DEVICE)}.get(mask)
    return new(B, H, T, D), new(B, heads, keys, D), new(B, heads, keys, D), prefixes, mask_, mask == "causal", 0.3


def in_front(q, k, v, prefixes, mask, causal, scale, dropout=0.0):
    """The definition, and what PEFT computes: every row gets a copy of its prefix."""
    outs = []
    for b in range(len(q)):
        keys, values = k[b], v[b]
        score = torch.zeros(q.shape[2], k.shape[2], dtype=q.dtype, device=q.device)
        if mask is not None:
            row = mask[b, 0]
            score = torch.where(row, 0.0, -torch.inf).to(q.dtype) if row.dtype == torch.bool else score + row
        if causal:
            score = score.masked_fill(torch.ones_like(score, dtype=torch.bool).triu(1), -torch.inf)
        for key, value, rows in prefixes:
            if rows is None or b in rows.tolist():
                keys, values = torch.cat([key, keys], 1), torch.cat([value, values], 1)
                score = torch.cat([score.new_zeros(len(score), key.shape[1]), score], 1)
        groups = q.shape[1] // k.shape[1]
        keys, values = keys.repeat_interleave(groups, 0), values.repeat_interleave(groups, 0)
        outs.append((q[b] @ keys.mT * scale + score).softmax(-1) @ values)
    return torch.stack(outs)


def exactly(args, grad):
    """What ``solve`` gives of the definition in float64."""

    def wide(t):
        return t.detach().double().requires_grad_()

    q, k, v, prefixes, mask, *rest = args
    mask = mask.double() if mask is not None and mask.is_floating_point() else mask
    pairs = [(wide(key), wide(value), which) for key, value, which in prefixes]
    return solve(in_front, (wide(q), wide(k), wide(v), pairs, mask, *rest), grad.double())


def solve(function, args, grad):
    leaves = [*args[:3], *(t for prefix in args[3] for t in prefix[:2])]
    out = function(*args)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]
