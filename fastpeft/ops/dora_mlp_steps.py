"""dora_mlp's forward, and how it and backward (``dora_mlp_gradients``) cut the rows and the weights.

    weights all dense     some rows at a time, each weight as a whole
    a weight quantised    all rows; in forward some rows of a weight at a time, in backward some of I

Either way h, dh, dgate, dup, and gate and up where they are made again, exist in part; around a quantised W_d h is
there as a whole in forward, since each part of W_d meets all of it. A part of a weight is written out once in a pass
(``Parts``): in forward it gives the norms of its rows too.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._mask import inverse_keep, threshold
from .base_parts import ALL, Parts
from .dora_linear import scaled_rows
from .dora_linear_norm import row_norms
from .lora_mlp_chunks import chunks, joined

FIRST, DOWN = slice(0, 2), slice(2, 3)


class Steps(NamedTuple):
    """The modules of a backend, and its name."""

    mlp: Any
    dora: Any
    linear: Any
    backend: str


class Operands(NamedTuple):
    """What forward and backward have in common: lists of gate, up and down, seeds and the activation's name."""

    lora_as: Sequence[Tensor]
    lora_bs: Sequence[Tensor]
    magnitudes: Sequence[Tensor]
    biases: Sequence[Tensor]
    scales: Sequence[float]
    dropouts: Sequence[float]
    seeds: Tensor
    activation: str

    def drops(self, p: int) -> bool:
        """Whether the base of projection p acts on a dropped input too, which LoRA's, without a magnitude, does not."""
        return self.magnitudes[p].numel() > 0 and threshold(self.dropouts[p]) > 0

    def down(self, which: slice) -> tuple:
        """What ``down`` of lora_linear takes of these projections, but for the seeds."""
        return self.lora_as[which], self.scales[which], self.dropouts[which]

    def split(self, s: Tensor) -> Sequence[Tensor]:
        """S of gate and S of up."""
        return s.split([a.shape[0] for a in self.lora_as[FIRST]], 1)


class Forward:
    """The output, part by part.

    Args:
        steps: the backend's modules.
        x: the input.
        weights: the three.
        given: as in backward.
        norms: of the rows of each, or empty.
        keeps: whether backward needs u of each.
    """

    def __init__(self, steps: Steps, x: Tensor, weights: Parts, given: Operands, norms, keeps: Sequence[bool]):
        self.steps, self.x, self.weights, self.given, self.keeps = steps, x, weights, given, keeps
        self.norms: list[Tensor] = [norm.clone() for norm in norms]
        self.gains: list[Any] = [None] * 3

    def run(self) -> tuple[list[Tensor], list[Tensor]]:
        """``[y]``, and S of gate and up, S of down, u of all three, gate and up, the gains and the norms."""
        x, given, linear = self.x, self.given, self.steps.linear
        s, us, ys, downs = linear.down(x, *given.down(FIRST), given.seeds[FIRST]), [], [], []
        for p, s_p in enumerate(given.split(s)):
            u, own = self._memory(p)
            self._multiply(p, x, given.seeds, u, own)
            whole = given.drops(p) or not self.keeps[p]  # else it can be made again of what is kept
            ys.append(self._combined(p, s_p, u, own) if whole else x.new_empty(0))
            us.append(u if self.keeps[p] else x.new_empty(0))
            del u, own
        made = Made(self.steps, given, s, us, ys, self.gains)
        size = self.steps.mlp.chunk_rows(x.shape[0], min(x.shape[1], given.lora_bs[2].shape[0]))
        u, own = self._memory(2)
        for rows, drawn in chunks(x.shape[0], size if self.weights.shapes[2] is None else x.shape[0], given.seeds):
            h = made.product(rows, size)
            downs.append(linear.down(h, *given.down(DOWN), drawn[DOWN]))
            self._multiply(2, h, drawn, u[rows], None if own is None else own[rows])
            del h
        s_down = joined(downs)
        y = self._combined(2, s_down, u, own)
        return [y], [s, s_down, *us, u if self.keeps[2] else x.new_empty(0), *ys, *self.gains, *self.norms]

    def _memory(self, p: int) -> tuple[Tensor, Tensor | None]:
        """For ``drop(x) Wᵀ`` of a projection and, where it drops, for ``x Wᵀ``."""
        shape = self.x.shape[0], self.given.lora_bs[p].shape[0]
        return self.x.new_empty(shape), self.x.new_empty(shape) if self.given.drops(p) else None

    def _multiply(self, p: int, source: Tensor, drawn: Tensor, u: Tensor, own: Tensor | None) -> None:
        """Both products of some rows; the first time the norms of the weight's rows too, and with them the gain."""
        given, found, n = self.given, [], u.shape[1]
        unknown = given.magnitudes[p].numel() > 0 and self.norms[p].numel() == 0
        dropout = given.dropouts[p] if own is not None else 0.0
        dropped = source if own is None else self.steps.dora.masked(source, dropout, drawn[p : p + 1])
        wanted = n if self.weights.shapes[p] is None else self.steps.mlp.part_columns(*u.shape)
        for part in self.weights.cut(p, n, wanted):
            w = self.weights.part(p, part)
            if unknown:
                found.append(
                    row_norms(w, given.lora_as[p], given.lora_bs[p][part], given.scales[p], self.steps.backend)
                )
            u[:, part].addmm_(dropped, w.T, beta=0, alpha=inverse_keep(dropout))
            if own is not None:
                own[:, part].addmm_(source, w.T, beta=0)
        if unknown:
            self.norms[p] = joined(found)
        if self.gains[p] is None:
            self.gains[p] = self._gain(p)

    def _gain(self, p: int) -> Tensor:
        """``m / n`` of a projection, 1 for LoRA."""
        sums, magnitude = torch.promote_types(self.given.lora_as[p].dtype, torch.float32), self.given.magnitudes[p]
        if magnitude.numel() == 0:
            return magnitude.new_ones(self.given.lora_bs[p].shape[0], dtype=sums)
        return magnitude.to(sums).div(self.norms[p])

    def _combined(self, p: int, s: Tensor, u: Tensor, own: Tensor | None) -> Tensor:
        """The projection's output."""
        bias, gain = self.given.biases[p], self.gains[p]
        operands = s, scaled_rows(self.given.lora_bs[p], gain), bias if bias.numel() else None, u
        return self.steps.dora.combined(*operands, *((gain,) if own is None else (gain - 1, own)))


class Made:
    """Gate and up of some rows and columns: as they are kept, or made again of u and S.

    Args:
        steps: the backend's modules.
        given: the operands.
        s: S of gate and up.
        us: u of both, or empty.
        ys: gate and up, or empty.
        gains: of both, or of all.
    """

    def __init__(self, steps: Steps, given: Operands, s: Tensor, us, ys, gains: Sequence[Tensor]):
        self.steps, self.given, self.us, self.ys, self.gains = steps, given, us, ys, gains
        self.s = given.split(s) if any(y.dim() < 2 for y in ys) else ()
        self.cs = [scaled_rows(b, gain) for b, gain in zip(given.lora_bs[FIRST], gains[FIRST], strict=True)]

    def __call__(self, p: int, rows: slice, part: slice = ALL) -> Tensor:
        y, bias = self.ys[p], self.given.biases[p]
        if y.dim() == 2:
            return y[rows, part]
        operands = self.cs[p][part], bias[part] if bias.numel() else None, self.us[p][rows, part], self.gains[p][part]
        return self.steps.dora.combined(self.s[p][rows], *operands)

    def product(self, rows: slice, size: int) -> Tensor:
        """``h = act(gate) ∘ up`` of these rows, so many at a time."""
        forward, activation = self.steps.mlp.forward, self.given.activation
        count = rows.stop - rows.start
        if count <= size:
            return forward(self(0, rows), self(1, rows), activation)
        like = self.us[0] if self.us[0].dim() == 2 else self.ys[0]
        h = like.new_empty(count, like.shape[1])
        for some, _ in chunks(count, size, self.given.seeds[:0]):
            h[some] = forward(self(0, some), self(1, some), activation)
        return h
