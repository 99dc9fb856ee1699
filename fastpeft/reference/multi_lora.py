"""LoRA for a batch whose tokens belong to different adapters: the definition, and the steps that every backend offers.

``multi_lora`` is what the op means: each adapter's tokens go through ``lora_linear`` as if they were alone. ``forward``
and ``backward`` are the same algebra in four steps, cut where the kernels cut it; on the CPU they also run. Shapes: ``x
[T, K]``, ``a [slots, R, K]``, ``b [slots, N, R]``; S is ``[planes, T, R]``, R summed over the slices (q, k and v) that
share x, its rows in the order of ``Routing``. A sum over the planes is the S that is meant; here there is one plane.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._mask import LANES
from .dropout import keep_mask
from .lora_linear import lora_linear
from .one_pass import one_pass
from .routing import Routing
from .slot_groups import Group, groups_of, used_slots


class Slots(NamedTuple):
    """What differs between slots, as tables on the device: ``[slots]``, or ``[P, slots]`` where slices differ too.

    Attributes:
        scales: float32 or float64, the factors of the low-rank terms.
        ranks: int32, the slots' true ranks, or None for all that there is.
        thresholds: int32 ``[slots]`` of the dropout (see ``fastpeft.reference.dropout``), or None for no dropout.
        seeds: int64, of the dropout masks, or None where nothing is dropped.
    """

    scales: Tensor
    ranks: Tensor | None = None
    thresholds: Tensor | None = None
    seeds: Tensor | None = None

    def of(self, p: int) -> "Slots":
        """The tables of one slice.

        Args:
            p: the number of the slice.
        """
        return Slots._make(table[p] if table is not None and table.dim() == 2 else table for table in self)


def multi_lora(
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    token_slots: Tensor,
    scales: Tensor,
    ranks: Tensor | None = None,
    y: Tensor | None = None,
    dropouts: Sequence[float] | None = None,
    seeds: Tensor | None = None,
) -> Tensor:
    """``y[t] + scale[s] · (drop(x[t]) A[s]ᵀ) B[s]ᵀ`` with ``s = token_slots[t]``; y[t] where s is -1.

    Args:
        x: the input ``[T, K]``.
        lora_a: A ``[slots, R, K]``, in x's dtype or a wider one.
        lora_b: B ``[slots, N, R]`` in lora_a's dtype.
        token_slots: each token's slot ``[T]``, or -1 for none.
        scales: factors of the low-rank terms ``[slots]``.
        ranks: true ranks ``[slots]``: rows of A and columns of B beyond them are not read. None: R.
        y: what is added to, ``[T, N]``, or None for 0.
        dropouts: a probability in [0, 1) for each slot, or None for no dropout.
        seeds: int64 ``[slots]``, of the masks. A mask's rows count a slot's own tokens, so that an adapter draws the
            mask that it would draw alone.

    Returns:
        ``[T, N]`` in x's dtype.
    """
    y = x.new_zeros(len(x), lora_b.shape[1]) if y is None else y
    for slot, scale in enumerate(scales.tolist()):
        tokens = (token_slots == slot).nonzero()[:, 0]
        rank = lora_a.shape[1] if ranks is None else int(ranks[slot])
        if rank == 0 or len(tokens) == 0:
            continue
        dropout, seed = 0.0 if dropouts is None else dropouts[slot], None if seeds is None else seeds[slot]
        delta = lora_linear(x[tokens], None, lora_a[slot, :rank], lora_b[slot, :, :rank], None, scale, dropout, seed)
        y = y.index_add(0, tokens, delta)
    return y


def planes(k: int, tile: int, dtype: torch.dtype) -> int:
    """How many sums make up S: here they are not cut along K."""
    return 1


def forward(
    ys: Sequence[Tensor],
    x: Tensor,
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    routing: Routing,
    slots: Slots,
) -> Tensor:
    """``y_p += S_p B_pᵀ`` for each token that has an adapter, in place; returns S as ``shrink`` does."""
    if slots.thresholds is None:
        s = one_pass(ys, x, lora_as, lora_bs, routing, slots.scales, slots.ranks)
        if s is not None:
            return s
    s = shrink(x, lora_as, routing, slots)
    expand_(ys, s, lora_bs, routing, slots)
    return s


def backward(
    dys: Sequence[Tensor],
    x: Tensor,
    s: Tensor,
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    routing: Routing,
    slots: Slots,
    need_dx: bool,
    need_da: bool,
    need_db: bool,
) -> tuple[Tensor | None, list[Tensor] | None, list[Tensor] | None]:
    """dX, and dA and dB of every slice. Where dA is not needed, x serves for its shape and dtype alone."""
    ds, dbs = expand_backward(dys, s if need_db else None, lora_bs, routing, slots, need_dx or need_da, need_db)
    dx = das = None
    if ds is not None:
        dx, das = shrink_backward(ds, x, lora_as, routing, slots, need_dx, need_da)
    return dx, das, dbs


def shrink(x: Tensor, lora_as: Sequence[Tensor], routing: Routing, slots: Slots) -> Tensor:
    """``S_p = scale_p · drop_p(x) A_pᵀ`` of each token's slot, side by side: ``[1, T, R]``. The rest is not written."""
    s = x.new_empty(1, len(x), sum(a.shape[1] for a in lora_as), dtype=_sums(lora_as[0]))
    for p, (a, s_p) in enumerate(zip(lora_as, s[0].split([a.shape[1] for a in lora_as], 1), strict=True)):
        of_p = slots.of(p)
        for group in groups_of(routing, of_p.ranks, a.shape[1]):
            x_g = x.index_select(0, group.tokens).to(s.dtype).view(len(group.slots), -1, x.shape[1])
            factor = None if of_p.thresholds is None else _drop(x_g, group, of_p)
            s_g = _project(x_g, a, group, of_p)
            s_g = s_g if factor is None else s_g.mul_(factor)
            s_p[group.places, : group.rank] = group.without_padding(s_g)
    return s


def expand_(ys: Sequence[Tensor], s: Tensor, lora_bs: Sequence[Tensor], routing: Routing, slots: Slots) -> None:
    """``y_p += S_p B_pᵀ`` for each token that has an adapter, in place, rounded once."""
    for p, (y, b, s_p) in enumerate(zip(ys, lora_bs, s[0].split([b.shape[2] for b in lora_bs], 1), strict=True)):
        for group in groups_of(routing, slots.of(p).ranks, b.shape[2]):
            s_g = s_p.index_select(0, group.rows)[:, : group.rank].view(len(group.slots), -1, group.rank)
            _add(y, s_g, b, group)


def add_(
    ys: Sequence[Tensor],
    x: Tensor,
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    routing: Routing,
    slots: Slots,
) -> None:
    """``forward`` where nobody asks for S, without dropout: nothing is put in order between, x is gathered once."""
    if one_pass(ys, x, lora_as, lora_bs, routing, slots.scales, slots.ranks) is not None:
        return
    gathered: dict[int, tuple[Tensor, Group]] = {}
    for p, (y, a, b) in enumerate(zip(ys, lora_as, lora_bs, strict=True)):
        of_p = slots.of(p)
        for group in groups_of(routing, of_p.ranks, a.shape[1]):
            found = gathered.get(id(group))  # slices of equal ranks have the same groups
            if found is None:
                x_g = x.index_select(0, group.tokens).to(_sums(a)).view(len(group.slots), -1, x.shape[1])
                found = gathered[id(group)] = x_g, group  # held, since an id is only as unique as its object is alive
            _add(y, _project(found[0], a, group, of_p), b, group)


def _project(x: Tensor, a: Tensor, group: Group, slots: Slots) -> Tensor:
    a = a[group.chosen, : group.rank].to(x.dtype)
    return torch.bmm(x, a.mT).mul_(slots.scales[group.chosen].view(-1, 1, 1))


def _add(y: Tensor, s: Tensor, b: Tensor, group: Group) -> None:
    delta = group.without_padding(torch.bmm(s, b[group.chosen, :, : group.rank].to(s.dtype).mT))
    if y.dtype == s.dtype:
        y.index_add_(0, group.real_tokens, delta)
    else:
        y[group.real_tokens] = delta.add_(y[group.real_tokens]).to(y.dtype)


def expand_backward(
    dys: Sequence[Tensor],
    s: Tensor | None,
    lora_bs: Sequence[Tensor],
    routing: Routing,
    slots: Slots,
    need_ds: bool,
    need_db: bool,
) -> tuple[Tensor | None, list[Tensor] | None]:
    """``dS_p = scale_p · dY_p B_p`` as ``[1, T, R]`` and, for every p, ``dB_p = dY_pᵀ S_p`` of each slot."""
    ds, dbs, slots = [], [], slots._replace(thresholds=None)
    split = [None] * len(lora_bs) if s is None else s.split([b.shape[2] for b in lora_bs], 2)
    for p, (dy, b, s_p) in enumerate(zip(dys, lora_bs, split, strict=True)):
        if need_ds:
            ds.append(shrink(dy, [b.mT], routing, slots.of(p)))
        if need_db:
            dbs.append(_outer(s_p[0], dy, routing, slots.of(p), b.dtype).mT.contiguous())
    return torch.cat(ds, 2) if need_ds else None, dbs if need_db else None


def shrink_backward(
    ds: Tensor,
    x: Tensor,
    lora_as: Sequence[Tensor],
    routing: Routing,
    slots: Slots,
    need_dx: bool,
    need_da: bool,
) -> tuple[Tensor | None, list[Tensor] | None]:
    """``dX = Σ_p mask_p ∘ (dS_p A_p) / (1 - p)`` and, for every p, ``dA_p = dS_pᵀ drop_p(x)`` of each slot."""
    tokens, das = _tokens(routing), []
    total = ds.new_zeros(len(tokens), x.shape[1])
    for p, (a, ds_p) in enumerate(zip(lora_as, ds[0].split([a.shape[1] for a in lora_as], 1), strict=True)):
        of_p = slots.of(p)
        for slot, rows, rank in _slices(routing, of_p.ranks, a.shape[1]) if need_dx else ():
            mask, factor = _mask(of_p, slot, rows, total)
            part = (ds_p[rows, :rank] @ a[slot, :rank].to(ds.dtype)).mul_(factor)
            total[rows] += part if mask is None else part.mul_(mask)
        if need_da:
            das.append(_outer(ds_p, x, routing, of_p, a.dtype))
    dx = x.new_zeros(x.shape).index_copy_(0, tokens, total.to(x.dtype)) if need_dx else None
    return dx, das if need_da else None


def _outer(s, x, routing, slots, dtype):
    """``Sᵀ drop(x)`` of each slot: ``[slots, R, K]``."""
    g = x.new_zeros(routing.slots, s.shape[1], x.shape[1], dtype=dtype)
    x = _sorted(x, routing).to(s.dtype)
    for slot, rows, rank in _slices(routing, slots.ranks, s.shape[1]):
        mask, factor = _mask(slots, slot, rows, x)
        x_s = x[rows] if mask is None else mask.mul_(x[rows])
        g[slot, :rank] = (s[rows, :rank].T @ x_s).mul_(factor)
    return g


def _slices(routing: Routing, ranks: Tensor | None, largest: int) -> Iterator[tuple[int, slice, int]]:
    """(slot, its places in the order, its true rank)."""
    true = None if ranks is None else ranks.tolist()
    for slot, start, stop, rank in used_slots(routing.starts.tolist(), true, largest):
        yield slot, slice(start, stop), rank


def _drop(x: Tensor, group: Group, slots: Slots) -> Tensor:
    """Apply each slot's mask to ``x [slots, tokens, K]`` in place; returns 1 / (1 - p) as ``[slots, 1, 1]``."""
    factors = []
    for x_s, slot, count in zip(x, group.slots, group.counts, strict=True):
        mask, factor = _mask(slots, slot, slice(0, count), x_s)
        factors.append(factor)
        if mask is not None:
            x_s[:count].mul_(mask)
    return x.new_tensor(factors)[:, None, None]


def _mask(slots: Slots, slot: int, rows: slice, like: Tensor) -> tuple[Tensor | None, float]:
    """The dropout mask of a slot's tokens, and 1 / (1 - p)."""
    dropped = 0 if slots.thresholds is None else int(slots.thresholds[slot])
    if not dropped:
        return None, 1.0
    p = dropped / LANES
    seed = None if slots.seeds is None else slots.seeds[slot]
    return keep_mask(seed, p, rows.stop - rows.start, like.shape[1], like.dtype), LANES / (LANES - dropped)


def _tokens(routing: Routing) -> Tensor:
    """The tokens that have an adapter, by slot."""
    return routing.order[: int(routing.starts[-1])].long()


def _sorted(x: Tensor, routing: Routing) -> Tensor:
    return x.index_select(0, _tokens(routing))


def _sums(a: Tensor) -> torch.dtype:
    return torch.promote_types(a.dtype, torch.float32)
