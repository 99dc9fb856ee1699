"""lora_mlp where all weights are dense, some rows at a time: which, with which seeds, and how results come together."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .._device import constant
from .._mask import ROW_STEP

_FIRST, _DOWN = slice(0, 2), slice(2, 3)


def forward(
    impl: Any, linear: Any, x: Tensor, lists: Sequence[Sequence], seeds: Tensor, activation: str
) -> tuple[list[Tensor], list[Tensor]]:
    """``[y]``, and S of gate and up, S of down, gate and up; lists as of lora_linear's steps."""
    (gate, up), s = linear.forward(x, *_of(_FIRST, lists), seeds[_FIRST])
    ys, downs = [], []
    for rows, drawn in chunks(x.shape[0], impl.chunk_rows(x.shape[0], _narrowest(lists[0])), seeds):
        h = impl.forward(gate[rows], up[rows], activation)
        (y,), s_down = linear.forward(h, *_of(_DOWN, lists), drawn[_DOWN])
        ys.append(y)
        downs.append(s_down)
    return [joined(ys)], [s, joined(downs), gate, up]


def backward(
    impl: Any,
    linear: Any,
    dy: Tensor,
    saved: Sequence[Tensor],
    lists: Sequence[Sequence],
    seeds: Tensor,
    needs: Sequence[bool],
    activation: str,
) -> list[Tensor | None]:
    """``[dx, *dW, *dA, *dB, *dbias]``, with None for what is not needed; lists as in ``forward``.

    ``saved`` is x and what ``forward`` gave, or nothing but x: then each chunk computes its own again.
    """
    x, s, s_down, gate, up = saved
    weights, lora_as, lora_bs, _, scales, dropouts = lists
    low, again = (weights, lora_as, lora_bs, scales, dropouts), is_absent(gate)
    need_dx, need_dw, need_da, need_db, need_dbias = needs
    size = impl.chunk_rows(dy.shape[0], _narrowest(weights))
    dxs, sums = [], Sums()
    for rows, drawn in chunks(dy.shape[0], dy.shape[0] if need_dw or need_dbias else size, seeds):
        dy_c, x_c, s_c, s_down_c = dy[rows], x[rows], s[rows], s_down[rows]
        if again:
            (gate_c, up_c), s_c = linear.forward(x_c, *_of(_FIRST, lists), drawn[_FIRST])
        else:
            gate_c, up_c = gate[rows], up[rows]
        h = impl.forward(gate_c, up_c, activation) if need_da or need_dw or (again and need_db) else gate_c
        if again and need_db:
            s_down_c = linear.down(h, lora_as[_DOWN], scales[_DOWN], dropouts[_DOWN], drawn[_DOWN])
        dh, da, db = linear.backward([dy_c], h, s_down_c, *_of(_DOWN, low), drawn[_DOWN], True, need_da, need_db)
        dw_down = dy_c.T @ h if need_dw else None
        del h  # its memory is dgate's
        d = impl.backward_(dh, gate_c, up_c, activation)
        del gate_c, up_c
        dx, das, dbs = linear.backward(d, x_c, s_c, *_of(_FIRST, low), drawn[_FIRST], need_dx, need_da, need_db)
        dxs.append(dx)
        dws = [*(t.T @ x_c for t in d), dw_down] if need_dw else [None] * 3
        dbiases = [t.sum(0, dtype=lora_bs[0].dtype) for t in (*d, dy_c)] if need_dbias else [None] * 3
        sums.add([*dws, *_three(das, da), *_three(dbs, db), *dbiases])
        del dh, d
    return [joined(dxs) if need_dx else None, *sums.totals()]


def is_absent(kept: Tensor) -> bool:
    """Whether this is the empty tensor in the place of one that was not kept."""
    return kept.dim() == 1


def chunks(rows: int, size: int, seeds: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The rows of each chunk, and the seeds that draw for its row 0 what ``seeds`` draw for that row of them all."""
    count = -(-rows // max(1, size))
    if count < 2:
        yield slice(0, rows), seeds
        return
    shifted = seeds + _offsets(count, size, seeds.device) if seeds.numel() else [seeds] * count
    for i in range(count):
        yield slice(i * size, (i + 1) * size), shifted[i]


def joined(parts: Sequence[Tensor]) -> Tensor:
    """The chunks' rows one below the other."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


class Sums:
    """The gradients of parameters, which are sums over the chunks: added in their order.

    In 16 bits the chunks' are kept, and added and rounded at once; in 32 they would be as large as what chunks save,
    and lose nothing where each is added to the sum of those before.
    """

    def __init__(self):
        self.parts: list[list[Tensor | None]] = []

    def add(self, parts: Sequence[Tensor | None]) -> None:
        """One chunk's gradients, of which the tensors may be overwritten."""
        if not self.parts or all(part is None or part.itemsize < 4 for part in parts):
            self.parts.append([*parts])
            return
        for total, part in zip(self.parts[0], parts, strict=True):
            if total is not None and part is not None:
                total.add_(part)

    def totals(self) -> list[Tensor | None]:
        """The gradients of all rows."""
        several = len(self.parts) > 1
        return [
            torch.stack([*parts]).sum(0) if several and parts[0] is not None else parts[0]
            for parts in zip(*self.parts, strict=True)
        ]


def _offsets(count: int, size: int, device: torch.device) -> Tensor:
    """``[count, 1]``: a row's key is a function of seed + row · ROW_STEP, in 64 bits that wrap."""
    steps = (chunk * size * ROW_STEP % 2**64 for chunk in range(count))
    return constant(tuple(step - 2**64 if step >> 63 else step for step in steps), torch.int64, device)[:, None]


def _of(projections: slice, lists: Sequence[Sequence]) -> list[Sequence]:
    return [items[projections] for items in lists]


def _three(pair, one) -> Sequence:
    return [None] * 3 if one is None else [*pair, *one]


def _narrowest(weights: Sequence[Tensor]) -> int:
    """Columns of the narrowest product of a chunk: y or dx."""
    return min(weights[0].shape[1], weights[2].shape[0])
