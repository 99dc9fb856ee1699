"""lora_mlp where weights are quantised: a part of the intermediate width at a time, so that their scratch is small.

    forward    gate and up: some of their columns at a time, each from the rows of W_g or W_u that give them
               y: some of its columns at a time, from rows of W_d
    backward   some of I at a time: columns of W_d give dh's, and dgate's and dup's meet the same rows of W_g and W_u

Each part of a weight is written out once in a pass, whatever the number of rows is. One after the other in one scratch
is what peaks lower: gate's and up's together would be twice as large, and whole weights four times: more than all that
exists beside them. dS of gate and up, and dx, are sums over the parts, of which the last adds its own onto the low-rank
term; with one part every step is that of dense weights in one chunk.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .base_parts import ALL, Parts
from .lora_mlp_chunks import is_absent

_FIRST, _DOWN = slice(0, 2), slice(2, 3)


class Operands(NamedTuple):
    """What forward and backward have in common: lists of gate, up and down, seeds and the activation's name."""

    lora_as: Sequence[Tensor]
    lora_bs: Sequence[Tensor]
    scales: Sequence[float]
    dropouts: Sequence[float]
    seeds: Tensor
    activation: str


def forward(
    impl: Any, linear: Any, x: Tensor, weights: Parts, biases: Sequence[Tensor], given: Operands
) -> tuple[list[Tensor], list[Tensor]]:
    """``[y]``, and S of gate and up, S of down, gate and up."""

    def computed(source, which):
        absent = [x.new_empty(0)] * len(given.lora_as[which])
        lists = given.lora_as[which], given.lora_bs[which], biases[which], given.scales[which], given.dropouts[which]
        ys, s = linear.forward(source, absent, *lists, given.seeds[which])
        for p, y in zip(range(3)[which], ys, strict=True):
            for part in weights.cut(p, y.shape[1], impl.part_columns(*y.shape)):
                y[:, part].addmm_(source, weights.part(p, part).T)
        return ys, s

    (gate, up), s = computed(x, _FIRST)
    ys, s_down = computed(impl.forward(gate, up, given.activation), _DOWN)
    return ys, [s, s_down, gate, up]


class Backward:
    """The gradients, part by part.

    Args:
        impl: lora_mlp's backend.
        linear: lora_linear's.
        dy: the incoming gradient.
        saved: x, S of gate and up, S of down, gate and up; or nothing but x, from which the others are computed again.
        weights: the three.
        biases: theirs.
        given: as in forward.
        needs: whether x, weights, A, B and biases ask for gradients.
    """

    def __init__(self, impl, linear, dy, saved, weights: Parts, biases, given: Operands, needs: Sequence[bool]):
        self.impl, self.linear, self.dy, self.weights, self.biases, self.given = (
            impl, linear, dy, weights, biases, given,
        )  # fmt: skip
        self.x, self.s, self.s_down, self.gate, self.up = saved
        self.again = is_absent(self.gate)
        self.need_dx, self.need_dw, self.need_da, self.need_db, self.need_dbias = needs
        self.dx: Tensor | None = None
        self.ds: list[Tensor] = []  # of gate and up, of each part
        self.das: list[Tensor] | None = None
        # Of gate and up or down, of each part: they lie side by side in the whole.
        self.da_down: list[Tensor] = []
        self.s_downs: list[Tensor] = []  # of each part, where S is computed again: a sum over them
        self.dws: list[list[Tensor | None]] = []
        self.dbs: list[list[Tensor]] = []
        self.dbiases: list[list[Tensor]] = []

    def run(self) -> list[Tensor | None]:
        """``[dx, *dW, *dA, *dB, *dbias]``, with None for what is not needed."""
        dy, (lora_as, lora_bs, scales, dropouts, seeds, _), down = self.dy, self.given, self.linear.ups_backward
        if self.again:
            self.s = self.linear.down(self.x, lora_as[_FIRST], scales[_FIRST], dropouts[_FIRST], seeds[_FIRST])
        has_s = self.need_db and not self.again
        ds_down, db_down = down([dy], self.s_down, lora_bs[_DOWN], scales[_DOWN], True, has_s)
        cuts = self._cuts(lora_bs[0].shape[0])
        for part in cuts:
            d = self._between(ds_down, part)
            self._first(d, part, last=part is cuts[-1])
            del d  # its memory is the next part's
        if self.s_downs:
            s_down = torch.stack(self.s_downs).sum(0) if len(self.s_downs) > 1 else self.s_downs[0]
            _, db_down = down([dy], s_down, lora_bs[_DOWN], scales[_DOWN], False, True)
        none: list[Tensor | None] = [None] * 3
        dbs = [torch.cat(side) for side in zip(*self.dbs, strict=True)]
        dbiases = [torch.cat(side) for side in zip(*self.dbiases, strict=True)]
        return [
            self.dx,
            *(self._weights() if self.need_dw else none),
            *([*self.das, torch.cat(self.da_down, 1)] if self.das is not None else none),
            *([*dbs, *db_down] if self.need_db else none),
            *([*dbiases, dy.sum(0, dtype=lora_bs[2].dtype)] if self.need_dbias else none),
        ]

    def _cuts(self, inner: int) -> list[slice]:
        """The parts of I that all three weights can be written out in."""
        wanted = self.impl.part_columns(self.dy.shape[0], inner)
        found = [self.weights.cut(p, inner, wanted, columns=p == 2) for p in range(3)]
        return min(found, key=len)

    def _between(self, ds_down: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        """dgate and dup of a part."""
        lora_as, _, scales, dropouts, seeds, activation = self.given
        (gate, up), dy = self._gate_and_up(part), self.dy
        needs_s = self.again and self.need_db
        h = self.impl.forward(gate, up, activation) if self.need_da or self.need_dw or needs_s else gate
        a = lora_as[2][:, part]
        if needs_s:
            self.s_downs.append(self.linear.down(h, [a], scales[_DOWN], dropouts[_DOWN], seeds[_DOWN], part.start))
        dh, da = self.linear.down_backward(ds_down, h, [a], dropouts[2:], seeds[_DOWN], True, self.need_da, part.start)
        self.da_down.extend(da or ())
        if self.need_dw:
            self.dws.append([None, None, None if self.weights.shapes[2] else dy.T @ h])
        del h  # its memory is dgate's
        dh.addmm_(dy, self.weights.part(2, ALL, part))
        return self.impl.backward_(dh, gate, up, activation)

    def _gate_and_up(self, part: slice) -> list[Tensor]:
        """Some of their columns."""
        if not self.again:
            return [self.gate[:, part], self.up[:, part]]
        found, lora_bs = [], self.given.lora_bs[_FIRST]
        for p, (s, b) in enumerate(zip(self.s.split([b.shape[1] for b in lora_bs], 1), lora_bs, strict=True)):
            bias = self.biases[p][part] if self.biases[p].numel() else None
            found.append(self.linear.up(s, b[part], bias, self.x.dtype))
            found[p].addmm_(self.x, self.weights.part(p, part).T)
        return found

    def _first(self, d: tuple[Tensor, Tensor], part: slice, last: bool) -> None:
        """What dgate and dup of a part give, and of the last one what S and A give of all."""
        lora_as, lora_bs, scales, dropouts, seeds, _ = self.given
        need_ds = self.need_dx or self.need_da
        ds, dbs = self.linear.ups_backward(d, self.s, [b[part] for b in lora_bs[:2]], scales[:2], need_ds, self.need_db)
        if self.need_db:
            self.dbs.append(dbs)
        if self.need_dw:
            self.dws[-1][:2] = [None if self.weights.shapes[p] else t.T @ self.x for p, t in enumerate(d)]
        if self.need_dbias:
            self.dbiases.append([t.sum(0, dtype=lora_bs[0].dtype) for t in d])
        if need_ds:
            self.ds.append(ds)
        if last and need_ds:
            ds = self.ds[0] if len(self.ds) == 1 else torch.stack(self.ds).sum(0)
            operands = ds, self.x, lora_as[:2], dropouts[:2], seeds[_FIRST], self.need_dx, self.need_da
            low, self.das = self.linear.down_backward(*operands)
            self.dx = low if self.dx is None else low.add_(self.dx)
        for p, t in enumerate(d) if self.need_dx else ():
            w = self.weights.part(p, part)
            self.dx = t @ w if self.dx is None else self.dx.addmm_(t, w)

    def _weights(self) -> list[Tensor | None]:
        """dW of those that are dense."""
        return [
            None if side[0] is None else torch.cat(side, 1 if p == 2 else 0)
            for p, side in enumerate(zip(*self.dws, strict=True))
        ]
