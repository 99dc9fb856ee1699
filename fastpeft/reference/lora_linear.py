"""LoRA around a frozen linear layer, in plain PyTorch: the definition, and the steps that every backend offers.

``lora_linear`` is what the op means; autograd differentiates it. ``forward`` and ``backward`` are the same algebra in
steps, cut where the kernels cut it, with the gradients written out; on the CPU they are also what runs. Shapes:
``x [M, K]``, ``a [r, K]``, ``b [N, r]``, ``s [M, R]``. R is the sum of the ranks of the branches that share x; each
branch has its A, B, scale, dropout and seed. a and b may have a wider dtype than x; s always has theirs.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .._mask import inverse_keep, threshold
from .dropout import drawn_mask, keep_mask

_BLOCK = 1 << 16  # elements of a part in float32


def lora_linear(
    x: Tensor,
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None = None,
    scale: float = 1.0,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """``y = x Wᵀ + bias + scale · (drop(x) Aᵀ) Bᵀ`` (Hu et al., "LoRA", 2021).

    Args:
        x: the input ``[..., K]``.
        weight: W ``[N, K]`` in x's dtype, or None for the low-rank term alone.
        lora_a: A ``[r, K]``, in x's dtype or a wider one, in which the low-rank branch is then computed.
        lora_b: B ``[N, r]`` in lora_a's dtype.
        bias: ``[N]``, or None for none.
        scale: factor of the low-rank term, without a unit: ``alpha / r`` or ``alpha / sqrt(r)``.
        dropout: probability of dropping an element of x in the low-rank branch, in [0, 1).
        seed: of the dropout mask, one int64 element on x's device. It is read where dropout is above 0.

    Returns:
        ``[..., N]`` in x's dtype.
    """
    dropped = x
    if threshold(dropout):
        mask = keep_mask(seed, dropout, x[..., 0].numel(), x.shape[-1], x.dtype)
        dropped = x * mask.view(x.shape) * inverse_keep(dropout)
    y = scale * (dropped.to(lora_a.dtype) @ lora_a.T) @ lora_b.T
    if weight is not None:
        y = F.linear(x, weight) + y
    if bias is not None:
        y = y + bias
    return y.to(x.dtype)


def forward(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    biases: Sequence[Tensor],
    scales: Sequence[float],
    dropouts: Sequence[float],
    seeds: Tensor,
) -> tuple[list[Tensor], Tensor]:
    """y of every projection, and S ``[M, R]``; absent weights and biases are empty tensors."""
    s = down(x, lora_as, scales, dropouts, seeds)
    ys = []
    for weight, b, bias, s_p in zip(weights, lora_bs, biases, _split(s, lora_as), strict=True):
        y = up(s_p, b, bias if bias.numel() else None, x.dtype)
        ys.append(y.addmm_(x, weight.T) if weight.numel() else y)
    return ys, s


def backward(
    dys: Sequence[Tensor],
    x: Tensor,
    s: Tensor,
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scales: Sequence[float],
    dropouts: Sequence[float],
    seeds: Tensor,
    need_dx: bool,
    need_da: bool,
    need_db: bool,
) -> tuple[Tensor | None, list[Tensor] | None, list[Tensor] | None]:
    """dX, and ``dA_p`` and ``dB_p = dY_pᵀ S_p`` of every projection, by ``dS_p = scale_p · dY_p B_p``.

    x is read for dA alone, else it serves for its dtype, and S for dB alone.
    """
    dx = das = None
    ds, dbs = ups_backward(dys, s, lora_bs, scales, need_dx or need_da, need_db)
    if ds is not None:
        dx, das = down_backward(ds, x, lora_as, dropouts, seeds, need_dx, need_da)
    if dx is not None:
        for dy, weight in zip(dys, weights, strict=True):
            if weight.numel():
                dx.addmm_(dy, weight)
    return dx, das, dbs


def ups_backward(
    dys: Sequence[Tensor],
    s: Tensor,
    lora_bs: Sequence[Tensor],
    scales: Sequence[float],
    need_ds: bool,
    need_db: bool,
) -> tuple[Tensor | None, list[Tensor] | None]:
    """``dS_p = scale_p · dY_p B_p`` side by side, ``[M, R]``, and ``dB_p = dY_pᵀ S_p`` of every projection."""
    ds: list[Tensor] = []
    dbs: list[Tensor] = []
    parts = s.split([b.shape[1] for b in lora_bs], 1) if need_db else ()
    for p, (dy, b) in enumerate(zip(dys, lora_bs, strict=True)):
        if need_ds:
            ds.append(b.new_empty(dy.shape[0], b.shape[1]))
        if need_db:
            dbs.append(b.new_zeros(b.shape[1], b.shape[0]))
        for rows in row_blocks(b.dtype, dy):
            wide = dy[rows].to(b.dtype)
            if need_ds:
                ds[p][rows].addmm_(wide, b, beta=0, alpha=scales[p])
            if need_db:
                dbs[p].addmm_(parts[p][rows].T, wide)  # twice as fast on a CPU as dYᵀ S, and the same bits
    stacked = None if not ds else ds[0] if len(ds) == 1 else torch.cat(ds, 1)
    return stacked, [db.T.contiguous() for db in dbs] if need_db else None


def down(
    x: Tensor,
    lora_as: Sequence[Tensor],
    scales: Sequence[float],
    dropouts: Sequence[float],
    seeds: Tensor | None,
    first: int = 0,
) -> Tensor:
    """``S_p = scale_p · drop_p(x) A_pᵀ`` for every branch p, side by side: ``[M, R]``; ``first`` as below."""
    dtype = lora_as[0].dtype
    s = x.new_empty(x.shape[0], sum(a.shape[0] for a in lora_as), dtype=dtype)
    if len(set(scales)) == 1 and not any(map(threshold, dropouts)):
        _add_down(s, x, _stack(lora_as), scales[0])
        return s
    for p, (a, s_p) in enumerate(zip(lora_as, _split(s, lora_as), strict=True)):
        mask = _mask(x, dropouts[p], seeds, p, first + x.shape[1])
        _add_down(s_p, x if mask is None else mask[:, first:].mul_(x), a, scales[p] * inverse_keep(dropouts[p]))
    return s


def _add_down(s: Tensor, x: Tensor, a: Tensor, factor: float) -> None:
    for rows in row_blocks(s.dtype, x):
        # One call: a tiny multiplication after a large GEMM finds cold caches, 70 us.
        s[rows].addmm_(x[rows].to(s.dtype), a.T, beta=0, alpha=factor)


def up(s: Tensor, b: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``S Bᵀ + bias``: ``[M, N]`` in ``dtype``."""
    wide = None if bias is None else bias.to(s.dtype)
    y = s.new_empty(s.shape[0], b.shape[0], dtype=dtype)
    for rows in row_blocks(s.dtype, y):
        part = y[rows] if dtype == s.dtype else None
        part = torch.mm(s[rows], b.T, out=part) if wide is None else torch.addmm(wide, s[rows], b.T, out=part)
        if dtype != s.dtype:
            y[rows] = part
    return y


def down_backward(
    ds: Tensor,
    x: Tensor,
    lora_as: Sequence[Tensor],
    dropouts: Sequence[float],
    seeds: Tensor | None,
    need_dx: bool,
    need_da: bool,
    first: int = 0,
) -> tuple[Tensor | None, list[Tensor] | None]:
    """``dX = Σ_p mask_p ∘ (dS_p A_p) / (1 - p_p)`` ``[M, K]`` and, for every p, ``dA_p = dS_pᵀ drop_p(x)``.

    Where dA is not needed, x serves for its dtype alone. x and A may be some columns, of which ``first``, an even
    number, is the first.
    """
    if not need_da and not any(map(threshold, dropouts)):
        lora_as, dropouts = [_stack(lora_as)], [0.0]
    single, columns = len(lora_as) == 1, lora_as[0].shape[1]
    dx = ds.new_empty(ds.shape[0], columns, dtype=x.dtype if single else ds.dtype) if need_dx else None
    das = [a.new_zeros(a.shape) for a in lora_as] if need_da else None
    for p, (a, ds_p) in enumerate(zip(lora_as, _split(ds, lora_as), strict=True)):
        mask = _mask(ds, dropouts[p], seeds, p, first + columns, x.dtype)
        mask, factor = None if mask is None else mask[:, first:], inverse_keep(dropouts[p])
        for rows in row_blocks(ds.dtype, x if dx is None else dx):
            if dx is not None:
                part = dx[rows] if p == 0 and dx.dtype == ds.dtype else ds.new_empty(dx[rows].shape)
                part.addmm_(ds_p[rows], a, beta=0, alpha=factor)
                part = part if mask is None else part.mul_(mask[rows])
                dx[rows] = part if p == 0 else part.add_(dx[rows])
            if das is not None:
                dropped = x[rows] if mask is None else mask[rows].mul_(x[rows])
                # Not (xᵀ dS_p)ᵀ, whose sums over rows err a quarter more.
                das[p].addmm_(ds_p[rows].T, dropped.to(ds.dtype), alpha=factor)
    return None if dx is None else dx.to(x.dtype), das


def row_blocks(dtype: torch.dtype, cast: Tensor) -> list[slice]:
    """The rows of ``cast`` ``[M, C]``: on a CPU, where it is cast to ``dtype``, in parts that fit a core's cache."""
    rows, columns = cast.shape
    if dtype == cast.dtype or cast.device.type != "cpu":
        return [slice(0, rows)]
    step = max(16, _BLOCK // max(1, columns)) * torch.get_num_threads()
    return [slice(first, first + step) for first in range(0, rows, step)]


def _split(s: Tensor, lora_as: Sequence[Tensor]) -> Sequence[Tensor]:
    return (s,) if len(lora_as) == 1 else s.split([a.shape[0] for a in lora_as], 1)


def _stack(matrices: Sequence[Tensor]) -> Tensor:
    return matrices[0] if len(matrices) == 1 else torch.cat(list(matrices))


def _mask(
    like: Tensor,
    dropout: float,
    seeds: Tensor | None,
    p: int,
    columns: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor | None:
    if not threshold(dropout):
        return None
    seed = None if seeds is None else seeds[p]
    return drawn_mask(seed, dropout, like.shape[0], columns or like.shape[1], dtype or like.dtype)
