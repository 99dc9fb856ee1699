"""Decode steps as CUDA graphs: one launch a step, whatever its adapters, which are what lies in a buffer.

A graph is for so many rows and blocks, both rounded up to powers of two; rows that nobody needs read and write block 0,
which belongs to nobody. Graphs are captured when a step first needs one, and anew when an adapter has touched layers
that none had touched before.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..bank.bank import AdapterBank
from ..bank.batch import Batch
from .layout import Layout, Part
from .pages import Pages, blocks_for

_KEPT = 24  # graphs
_WASTE, _FEW = 4, 256  # of blocks that are read for nothing: so many times those in use, and a few
_NUMBERS = 6  # for each row: id, position, line, place, length, slot


class Captured:
    """The graphs of one batch of rows.

    Args:
        bank: around the model.
        tables: ``[places, blocks]``, whose last line is nobody's.
        pages: that they are in.
        forward: gives a layout's logits ``[T, V]``.
        reason: why no step is captured, or None.

    Attributes:
        reason: as given, or what went wrong when one was.
    """

    def __init__(
        self,
        bank: AdapterBank,
        tables: Tensor,
        pages: Pages,
        forward: Callable[[Layout], Tensor],
        reason: str | None,
    ):
        self.reason = reason
        self._bank, self._tables, self._pages, self._forward = bank, tables, pages, forward
        self._graphs: dict[tuple[int, int, int], tuple[Any, Tensor, Tensor, Tensor]] = {}
        self._pool: Any = None

    def step(self, parts: Sequence[Part], slots: Sequence[int]) -> Tensor | None:
        """The logits ``[n, V]`` of rows that bring one token each, or None where the step must be an eager one."""
        if self.reason is not None:
            return None
        rows = _up(len(parts))
        blocks = _up(max(blocks_for(part.length) for part in parts))
        used = sum(blocks_for(part.length) for part in parts)
        if rows * blocks > _WASTE * used + _FEW:
            return None  # one long row among short ones, which the groups of an eager step keep apart
        key = rows, min(blocks, self._tables.shape[1]), self._bank._slots.tables_made
        try:
            graph, host, given, logits = self._graphs[key] if key in self._graphs else self._capture(*key)
        except Exception as error:
            self.reason = f"the model cannot be captured ({type(error).__name__}: {str(error)[:80]})"
            return None
        idle = rows - len(parts)
        last = self._tables.shape[0] - 1
        columns = (
            [part.ids[0] for part in parts] + [0] * idle,
            [part.cached for part in parts] + [0] * idle,
            [part.place for part in parts] + [last] * idle,
            [part.place for part in parts] + [last] * idle,
            [part.length for part in parts] + [1] * idle,
            [*slots, *[-1] * idle],
        )
        host.copy_(torch.tensor([number for column in columns for number in column]))
        given.copy_(host, non_blocking=True)
        graph.replay()
        return logits[: len(parts)]

    def _capture(self, rows: int, blocks: int, made: int) -> tuple[Any, Tensor, Tensor, Tensor]:
        if len(self._graphs) >= _KEPT or any(key[2] != made for key in self._graphs):
            self._graphs.clear()
        device = self._tables.device
        host = torch.zeros(_NUMBERS * rows, dtype=torch.long, pin_memory=True)
        host[2 * rows : 4 * rows], host[4 * rows : 5 * rows] = self._tables.shape[0] - 1, 1
        host[5 * rows :] = -1
        given = host.to(device, non_blocking=True)

        def run() -> Tensor:
            layout = Layout.decoding(given[: 5 * rows], rows, blocks, self._tables, self._pages)
            with _routed(self._bank, given[5 * rows :].to(torch.int32)):
                return self._forward(layout)

        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(2):  # what is loaded and chosen in a first run cannot be captured
                run()
        torch.cuda.current_stream(device).wait_stream(side)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            logits = run()
        self._graphs[rows, blocks, made] = graph, host, given, logits
        return self._graphs[rows, blocks, made]


@contextlib.contextmanager
def _routed(bank: AdapterBank, slots: Tensor) -> Iterator[None]:
    """Inside, each token of a forward uses the slot that ``slots`` holds when it runs; ``use`` holds the adapters."""
    outer, bank._running.batch = bank._running.batch, Batch.of_slots("submit", slots, bank.slots)
    try:
        with torch.no_grad():
            yield
    finally:
        bank._running.batch = outer


def _up(count: int) -> int:
    """The next power of two."""
    return 1 << (count - 1).bit_length()
