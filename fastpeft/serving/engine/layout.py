"""How one step is laid out: the tokens of its rows side by side in ``[1, T]``, and where their keys and values lie.

Rows that bring one token each are put together with rows of about their length, so that a long one costs nobody else;
rows that read pieces of their prompts, with those whose pieces and places are the same.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from .pages import BLOCK, Pages, blocks_for


class Part:
    """One row's share of a step.

    Attributes:
        place: the row's line in the block tables.
        ids: the tokens that it brings, after ``cached`` tokens that the cache has.
        total: how many tokens the row has so far, of which later steps may read more.
    """

    def __init__(self, place: int, ids: Sequence[int], cached: int, total: int):
        self.place, self.ids, self.cached, self.total = place, ids, cached, total

    @property
    def length(self) -> int:
        """Tokens in the cache after the step."""
        return self.cached + len(self.ids)

    def group(self) -> tuple[int, int]:
        """Rows of which this is the same are computed together: within twice the length of each other, or equal."""
        return (0, (blocks_for(self.length) - 1).bit_length()) if len(self.ids) == 1 else (len(self.ids), self.cached)


class Shape(NamedTuple):
    """Of rows that are computed together: how many tokens each brings, their longest, and what needs no mask.

    even: all are as long. first: the cache has nothing of them yet.
    """

    rows: int
    queries: int
    longest: int
    even: bool
    first: bool


class Group:
    """Rows that attention computes together: tokens ``start`` to ``stop`` of the step, ``queries`` of each row."""

    def __init__(self, shape: Shape, start: int, places: Tensor, lengths: Tensor, tables: Tensor):
        self.rows, self.queries, self.longest, self._even, self._first = shape
        self.start, self.stop = start, start + self.rows * self.queries
        self._lengths, self._tables = lengths, tables.index_select(0, places)
        self._views: dict[int | None, tuple[Tensor, int, Tensor | None]] = {}

    def view(self, window: int | None) -> tuple[Tensor, int, Tensor | None]:
        """For attention to the last ``window`` tokens, or None for all.

        Returns:
            The blocks to read, ``[rows * n]``; how many of their tokens, of each row; and the mask
            ``[rows, 1, queries, tokens]``, True where a query sees a key, or None where a causal mask is all there is.
        """
        if window is not None and self.longest <= window:
            window = None
        if window not in self._views:
            self._views[window] = self._view(window)
        return self._views[window]

    def _view(self, window: int | None) -> tuple[Tensor, int, Tensor | None]:
        device, lengths = self._tables.device, self._lengths[:, None]
        count = blocks_for(self.longest)
        if window is None:
            table, tokens = self._tables[:, :count], self.longest
            if (self.queries == 1 and self._even) or (self._first and self._even):
                return table.reshape(-1), tokens, None
            keys = torch.arange(tokens, device=device).expand(self.rows, tokens)
        else:
            count = min(count, blocks_for(window + self.queries - 1) + 1)
            first = (lengths - (self.queries + window - 1)).clamp(min=0) // BLOCK
            last = self._tables.shape[1] - 1
            table = self._tables.gather(1, (first + torch.arange(count, device=device)).clamp(max=last))
            tokens = count * BLOCK
            keys = first * BLOCK + torch.arange(tokens, device=device)
        queries = lengths - self.queries + torch.arange(self.queries, device=device)
        mask = keys[:, None] <= queries[:, :, None]
        if window is not None:
            mask &= keys[:, None] > queries[:, :, None] - window
        return table.reshape(-1), tokens, mask[:, None]


class Layout:
    """One step of some rows.

    Args:
        parts: in the order of ``Part.group``.
        tables: ``[places, blocks]``, each row's blocks.
        pages: that they are in.

    Attributes:
        ids, positions: ``[1, T]``.
        totals: for each row, how many tokens of the step are its, and how many it has in all.
        groups: of attention.
    """

    def __init__(self, parts: Sequence[Part], tables: Tensor, pages: Pages):
        self.pages = pages
        self.totals = [(len(part.ids), part.total) for part in parts]
        ids = [i for part in parts for i in part.ids]
        positions = [p for part in parts for p in range(part.cached, part.length)]
        lines = [part.place for part in parts for _ in part.ids]
        # One copy to the device takes everything that the host knows.
        numbers = ids + positions + lines + [part.place for part in parts] + [part.length for part in parts]
        t = len(ids)
        host = torch.tensor(numbers, pin_memory=tables.is_cuda)
        given = host.to(tables.device, non_blocking=True)
        self._lay(given, t, [_shape(list(together)) for _, together in groupby(parts, Part.group)], tables)

    @classmethod
    def decoding(cls, given: Tensor, rows: int, blocks: int, tables: Tensor, pages: Pages) -> "Layout":
        """A step of one token of each row, of at most so many blocks, whose numbers are what ``given`` comes to hold.

        Args:
            given: ``[5 rows]``: ids, positions, twice the places, and the lengths after the step.
            rows: how many.
            blocks: that are read of each.
            tables: ``[places, blocks]``.
            pages: that they are in.
        """
        layout = cls.__new__(cls)
        layout.pages, layout.totals = pages, []
        layout._lay(given, rows, [Shape(rows, 1, blocks * BLOCK, False, False)], tables)
        return layout

    def _lay(self, given: Tensor, tokens: int, shapes: Sequence[Shape], tables: Tensor) -> None:
        rows = sum(shape.rows for shape in shapes)
        ids, at, lines, places, lengths = given.split([tokens, tokens, tokens, rows, rows])
        self.ids, self.positions = ids[None], at[None]
        self._blocks, self._offsets = tables[lines, at // BLOCK], at % BLOCK
        self.groups: list[Group] = []
        row = token = 0
        for shape in shapes:
            of = slice(row, row + shape.rows)
            self.groups.append(Group(shape, token, places[of], lengths[of], tables))
            row, token = of.stop, self.groups[-1].stop

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Put the step's keys and values, ``[1, heads, T, D]``, into the rows' blocks."""
        for pool, new in zip(self.pages.layers[layer], (keys, values), strict=True):
            pool.index_put_((self._blocks, self._offsets), new[0].transpose(0, 1))

    def read(self, layer: int, group: Group, window: int | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """A group's keys and values, ``[rows, heads, tokens, D]``, and its mask."""
        table, tokens, mask = group.view(window)
        keys, values = (
            pool.index_select(0, table).view(group.rows, -1, *pool.shape[2:])[:, :tokens].transpose(1, 2)
            for pool in self.pages.layers[layer]
        )
        return keys, values, mask


def _shape(parts: Sequence[Part]) -> Shape:
    lengths = [part.length for part in parts]
    longest = max(lengths)
    return Shape(
        len(parts), len(parts[0].ids), longest, longest == min(lengths), not any(part.cached for part in parts)
    )
