"""dora_mlp's backward: what each cut of the rows or of I gives, and how that comes together."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._mask import inverse_keep
from .base_parts import ALL, Parts
from .dora_linear import scaled_rows
from .dora_mlp_steps import DOWN, FIRST, Made, Operands, Steps
from .lora_mlp_chunks import Sums, chunks, joined


class Backward:
    """The gradients, part by part.

    Args:
        steps: the backend's modules.
        dy: the incoming gradient.
        saved: x, S of gate and up, S of down, lists of u, of gate and up, of the gains and of the norms.
        weights: the three.
        given: as in forward.
        needs: whether x, A, B, magnitudes and biases ask for gradients.
    """

    def __init__(self, steps: Steps, dy: Tensor, saved: Sequence, weights: Parts, given: Operands, needs):
        self.steps, self.dy, self.weights, self.given = steps, dy, weights, given
        self.x, self.s, self.s_down, self.us, ys, self.gains, self.norms = saved
        self.need_dx, self.need_da, self.need_db, self.need_dm, self.need_dbias = needs
        self.made = Made(steps, given, self.s, self.us, ys, self.gains)
        self.c_down = scaled_rows(given.lora_bs[2], self.gains[2])
        # Of A and C, whose chunks are rounded to their dtype; of gains and biases, in that of sums.
        self.sums, self.wide = Sums(), Sums()

    def run(self) -> list[Tensor | None]:
        """``[dx, *dA, *dB, *dm, *dbias]``, with None for what is not needed."""
        (rows, _), inner = self.dy.shape, self.given.lora_bs[0].shape[0]
        narrowest = min(self.given.lora_as[0].shape[1], self.dy.shape[1])
        quantised = any(shape is not None for shape in self.weights.shapes)
        size = rows if quantised else self.steps.mlp.chunk_rows(rows, narrowest)
        wanted = self.steps.mlp.part_columns(rows, inner) if quantised else inner
        cuts = min((self.weights.cut(p, inner, wanted, columns=p == 2) for p in range(3)), key=len)
        dxs: list[Any] = [self._rows(some, drawn, cuts) for some, drawn in chunks(rows, size, self.given.seeds)]
        sums, wide = self.sums.totals(), self.wide.totals()
        dbs, dms, dbiases = zip(*(self._trained(p, sums[3 + p], wide[p], wide[3 + p]) for p in range(3)), strict=True)
        return [joined(dxs) if self.need_dx else None, *sums[:3], *dbs, *dms, *dbiases]

    def _trained(self, p: int, dc: Any, dgain: Tensor | None, dbias: Tensor | None) -> Sequence[Tensor | None]:
        """The gradients of B, the magnitude and the bias of a projection, of those of C, the gain and the bias."""
        b, magnitude, dm = self.given.lora_bs[p], self.given.magnitudes[p], None
        if self.need_dm:
            dm = torch.zeros_like(magnitude)
            if dgain is not None:
                through_b = (dc.to(dgain.dtype) * b).sum(1)
                dm = (dgain + through_b).div_(self.norms[p]).to(magnitude.dtype)
        db = scaled_rows(dc, self.gains[p]) if self.need_db else None
        return db, dm, None if dbias is None else dbias.to(b.dtype)

    def _rows(self, rows: slice, drawn: Tensor, cuts: Sequence[slice]) -> Tensor | None:
        """dx of some rows, and what they add to the gradients of parameters."""
        given, linear, dy, dx, low = self.given, self.steps.linear, self.dy[rows], None, None
        need_dc, need_ds = self.need_db or self.need_dm, self.need_dx or self.need_da
        qs: list[Tensor | None] = [None, None]
        operands = [dy], self.s_down[rows], [self.c_down], given.scales[DOWN], True, need_dc
        ds_down, dc_down = linear.ups_backward(*operands)
        summed: list[list[Any]] = [[], [], [], []]  # of each part: dS and dC of gate and up, dA of down, the wide sums
        for part in cuts:
            d, da = self._between(rows, part, ds_down, drawn)
            cs = [c[part] for c in self.made.cs]
            ds, dcs = linear.ups_backward(d, self.s[rows], cs, given.scales[FIRST], need_ds, need_dc)
            for found, one in zip(summed, (ds, dcs, da and da[0], self._wide(d, self.us[:2], rows, part)), strict=True):
                found.append(one)
            if part is cuts[-1] and need_ds:
                ds = summed[0][0] if len(cuts) == 1 else torch.stack(summed[0]).sum(0)
                lists = given.lora_as[FIRST], given.dropouts[FIRST], drawn[FIRST], self.need_dx, self.need_da
                low, das = linear.down_backward(ds, self.x[rows], *lists)
                if len(cuts) == 1 and not (given.drops(0) or given.drops(1)):
                    dx, low = low, None
            for p, t in enumerate(d) if self.need_dx else ():
                dx, qs[p] = self._through_base(p, dx, qs[p], t, part, self.weights.part(p, part))
            del d  # its memory is the next part's
        if low is not None:  # of small numbers, so that what is as large as dx is rounded once
            for p, q in enumerate(qs):
                self._add_masked_(p, low, q, drawn)
            dx = low.add_(dx)
        _, dcs, da_down, wide = summed
        sides = [torch.cat(side) for side in zip(*dcs, strict=True)] + dc_down if need_dc else [None] * 3
        self.sums.add([*das, torch.cat(da_down, 1), *sides] if self.need_da else [None] * 3 + sides)
        gains, biases = self._wide([dy], self.us[2:], rows, ALL)
        whole = [
            [None if parts[0] is None else torch.cat(parts) for parts in zip(*lists, strict=True)] + own
            for lists, own in zip(zip(*wide, strict=True), (gains, biases), strict=True)
        ]
        self.wide.add([*whole[0], *whole[1]])
        return dx

    def _between(self, rows: slice, part: slice, ds_down: Tensor, drawn: Tensor) -> tuple[Any, Any]:
        """dgate and dup of a part, and dA of down."""
        given, linear, mlp = self.given, self.steps.linear, self.steps.mlp
        gate, up = self.made(0, rows, part), self.made(1, rows, part)
        h = mlp.forward(gate, up, given.activation) if self.need_da else gate
        operands = [given.lora_as[2][:, part]], given.dropouts[DOWN], drawn[DOWN], True, self.need_da, part.start
        dh, da = linear.down_backward(ds_down, h, *operands)
        del h  # its memory is dgate's
        dh, q = self._through_base(2, dh, None, self.dy[rows], ALL, self.weights.part(2, ALL, part))
        self._add_masked_(2, dh, q, drawn, part.start)
        del q
        return mlp.backward_(dh, gate, up, given.activation), da

    def _through_base(self, p: int, dx, q, d: Tensor, part: slice, w: Tensor) -> tuple[Tensor, Tensor | None]:
        """``dx + (g ∘ d) W`` and None; or with dropout ``dx + d W`` and ``q + ((g - 1) ∘ d) W / (1 - p)``, not masked.

        Both are in the places of dx and q, where those are; ``part`` is of the rows of W, which d meets.
        """
        gain, dora = self.gains[p][part], self.steps.dora
        if not self.given.drops(p):
            return _plus(dx, dora.scaled(d, gain), w), None
        return _plus(dx, d, w), _plus(q, dora.scaled(d, gain - 1), w, inverse_keep(self.given.dropouts[p]))

    def _add_masked_(self, p: int, dx: Tensor, q: Tensor | None, drawn: Tensor, first: int = 0) -> None:
        """``dx += mask ∘ q`` where there is a q; ``first`` is the number of their first column."""
        if q is not None:
            self.steps.dora.add_masked_(dx, q, self.given.dropouts[p], drawn[p : p + 1], first)

    def _wide(self, ds: Sequence[Tensor], us: Sequence[Tensor], rows: slice, part: slice) -> tuple[list, list]:
        """``Σ d ∘ u`` and ``Σ d`` of some rows and columns; None for what is not needed."""
        sums = self.gains[0].dtype
        gains = [
            self.steps.dora.gain_gradient(d, u[rows, part], sums) if self.need_dm and u.dim() == 2 else None
            for d, u in zip(ds, us, strict=True)
        ]
        return gains, [d.sum(0, dtype=sums) if self.need_dbias else None for d in ds]


def _plus(out: Tensor | None, d: Tensor, w: Tensor, factor: float = 1.0) -> Tensor:
    """``out + factor · d W`` in its place, or in a new one."""
    if out is not None:
        return out.addmm_(d, w, alpha=factor)
    return d.new_empty(d.shape[0], w.shape[1]).addmm_(d, w, beta=0, alpha=factor)
