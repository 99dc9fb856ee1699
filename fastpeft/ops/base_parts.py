"""Parts of weights, some of which are quantised: rows or columns that are written out one after the other.

Where an op can do with a part of a weight at a time, the scratch need not be as large as a weight. Each part is asked
for once in a pass, so that a weight is written out once in it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _backend
from .base import LAYOUT, TABLES, opaque, shapes
from .base_scratch import Scratch

ALL = slice(None)


class Parts:
    """Weights as ``base.parts`` gave them; a part of one is there until the next is asked for.

    Args:
        like: a tensor in whose dtype and on whose device they are written.
        weights: the tensors; parts of what is dense are views.
        tables: of the quantised ones.
        layouts: of all.
        backend: by which they are written.
    """

    def __init__(self, like: Tensor, weights: Sequence, tables: Sequence, layouts: Sequence[int], backend: str):
        self.weights, self.layouts, self.shapes = weights, layouts, shapes(weights, layouts)
        self.scratch, self.dtype = Scratch(like, backend), like.dtype
        self.impl = _backend.load("dequantise", backend)
        given = iter(tables)
        self.tables = [[next(given) for _ in range(TABLES if shape else 0)] for shape in self.shapes]
        self._opaque: tuple[int, Any] = -1, None

    def __enter__(self) -> "Parts":
        return self

    def __exit__(self, *_) -> None:
        self.scratch.done()

    def cut(self, p: int, size: int, wanted: int, columns: bool = False) -> list[slice]:
        """So many rows or columns of weight p at a time, of ``size``; all at once where its format has no parts.

        Args:
            p: the weight.
            size: how many there are.
            wanted: of each part, an even number.
            columns: whether it is columns.
        """
        step = wanted if wanted < size and self._has_parts(p, wanted, columns) else max(1, size)
        return [slice(first, min(first + step, size)) for first in range(0, size, step)]

    def part(self, p: int, rows: slice = ALL, columns: slice = ALL) -> Tensor:
        """These rows or columns of weight p, dense."""
        shape = self.shapes[p]
        if shape is None:
            return self.weights[p][rows, columns]
        block, block2 = self.layouts[LAYOUT * p + 2 : LAYOUT * (p + 1)]
        if block2 < 0:
            return self._whole(p, shape, block2)[rows, columns]
        (top, end, _), (left, right, _) = rows.indices(shape[0]), columns.indices(shape[1])
        out = self.scratch.take(end - top, right - left)
        self.impl.write(out, self.weights[p], *self.tables[p], block, block2, top * shape[1] + left, shape[1])
        return out

    def _has_parts(self, p: int, wanted: int, columns: bool) -> bool:
        shape, (block, block2) = self.shapes[p], self.layouts[LAYOUT * p + 2 : LAYOUT * (p + 1)]
        if shape is None or self.weights[p].dtype == torch.int8:
            return True
        return block2 > 0 and shape[1] % block == 0 and (not columns or wanted % block == 0)

    def _whole(self, p: int, shape: tuple[int, int], block2: int) -> Tensor:
        """What another library writes is whole; it is there for as long as no other weight is asked for."""
        if self._opaque[0] != p:
            self._opaque = -1, None
            self._opaque = p, opaque(block2, shape, self.dtype)
        return self._opaque[1]
