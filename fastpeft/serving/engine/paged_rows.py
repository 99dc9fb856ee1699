"""The rows of a running batch over a paged cache: a step takes one token of every row, and pieces of new prompts.

A row holds the blocks that its tokens need so far. Where they run out, the youngest rows give theirs back and are read
anew later; a row never waits for another's prompt, of which a step reads ``PROMPT_TOKENS`` at most.

A step that fails changes nothing but places of the cache that nobody reads. It is repeated: without the youngest row
where memory ran out, else in halves, until the rows are found that fail by themselves, twice. They end; nobody else
does. Where the device is lost nothing is repeated.
"""

import contextlib
import inspect
import traceback
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..bank.bank import AdapterBank
from .captured import Captured
from .layout import Layout, Part
from .memory import device_lost, out_of_memory
from .paged_attention import configs_of, running
from .paged_model import run
from .pages import LayerShape, Pages, blocks_for
from .request import Request
from .row_rope import length_dependent, recomputed_past, row_by_row

PROMPT_TOKENS = 512  # of prompts, in one step
_Share = tuple["_Row", Part]


class _Row:
    """A request with its place in the tables, its blocks, and how many of its tokens they hold."""

    def __init__(self, request: Request, place: int):
        self.request, self.place = request, place
        self.blocks: list[int] = []
        self.cached = 0
        self.read_as_long = False

    @property
    def length(self) -> int:
        return len(self.request.prompt) + len(self.request.tokens)

    def next(self, count: int) -> Part:
        prompt, tokens = self.request.prompt, self.request.tokens
        start, end = self.cached - len(prompt), self.cached + count - len(prompt)  # among the new tokens
        ids = prompt[self.cached : self.cached + count] + tokens[max(0, start) : max(0, end)]
        return Part(self.place, ids, self.cached, self.length)


class PagedRows:
    """Requests that run, each with its lease, over blocks of a cache.

    Args:
        bank: around the model.
        shapes: of the model's layers.
        max_rows: how many rows run at once.
        max_tokens: of the longest row.
        max_cached: tokens that the cache holds, rounded up to whole blocks.

    Attributes:
        requests: in the order in which they joined.
        succeeded, failed: how many forwards did, so far.
        preempted: how often a row gave its blocks back before it had ended.
    """

    def __init__(
        self, bank: AdapterBank, shapes: Sequence[LayerShape], max_rows: int, max_tokens: int, max_cached: int
    ):
        self.succeeded = self.failed = self.preempted = 0
        self._bank, self._model, self._device = bank, bank.model, bank.device
        self._configs = configs_of(self._model)
        self._pages = Pages(blocks_for(max_cached), shapes, self._device)
        self._rows: list[_Row] = []
        self._places = list(range(max_rows - 1, -1, -1))
        # The last line is nobody's, as is the block 0 that it names.
        self._tables = torch.zeros(max_rows + 1, blocks_for(max_tokens), dtype=torch.long, device=self._device)
        self._use = contextlib.ExitStack()  # the bank's batch, kept while the same rows take one token each
        self._in_use: list[Request] | None = None
        self._ropes, self._anew_past = length_dependent(self._model), recomputed_past(self._model)
        eager = "the rows' rope depends on their lengths" if self._ropes else None
        eager = eager if self._device.type == "cuda" else f"on {self._device.type}"
        self._captured = Captured(bank, self._tables, self._pages, self._logits, eager)
        self._picks = "logits_to_keep" in inspect.signature(type(self._model).forward).parameters

    @property
    def kind(self) -> str:
        """The cache, and how its steps are started."""
        eager = self._captured.reason
        return f"paged, {'decoding in CUDA graphs' if eager is None else f'eager ({eager})'}:"

    @property
    def requests(self) -> list[Request]:
        """Those that run."""
        return [row.request for row in self._rows]

    def has_room(self, request: Request, others: Sequence[Request]) -> bool:
        """Whether the blocks reach for what it and the others have so far, and a token more of each."""
        return sum(blocks_for(len(r.prompt) + len(r.tokens) + 1) for r in (*others, request)) <= self._pages.blocks

    def join(self, requests: Sequence[Request]) -> None:
        """New rows, the last ones then; the next steps read their prompts."""
        self._rows += [_Row(request, self._places.pop()) for request in requests]

    def step(self) -> tuple[list[Request], Tensor] | None:
        """Take a step with as many rows as there is memory for. Rows that fail end in error, and leave.

        Returns:
            The requests that have a next token now, and its logits ``[n, V]``; or None.
        """
        while self._rows:
            shares = self._shares()
            try:
                return self._advance(shares)
            except Exception as failure:
                error = failure
            traceback.clear_frames(error.__traceback__)  # which hold the step's tensors
            if device_lost(error):
                self.clear("error", error)
                break
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            if len(shares) == 1 or not out_of_memory(error):
                return self._advance_apart(shares)
            youngest = max((row for row, _ in shares), key=self._rows.index)
            youngest.request.finish("error", error)
            self.leave()
        return None

    def probe(self) -> None:
        """Read one token with the bare model. Raises what the model raises."""
        with self._bank.use([None]):
            self._model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self._device), use_cache=False)

    def leave(self) -> None:
        """Let the rows go whose requests have ended."""
        gone = [row for row in self._rows if row.request.done]
        if not gone:
            return
        self._leave_use()
        self._rows = [row for row in self._rows if not row.request.done]
        self._give_back(gone)
        self._places += [row.place for row in gone]

    def put_out(self, request: Request) -> None:
        """Let a row go that has not ended; it may join again, and is read anew then."""
        self._leave_use()
        row = next(row for row in self._rows if row.request is request)
        self._rows.remove(row)
        self._give_back([row])
        self._places.append(row.place)
        self.preempted += 1

    def clear(self, reason: str, error: BaseException | None = None) -> None:
        """End every row."""
        for row in self._rows:
            row.request.finish(reason, error)
        self.leave()

    def _shares(self) -> list[_Share]:
        """The rows of the next step and their tokens, those with one token first; each has blocks for them."""
        reading = [row for row in self._rows if row.length - row.cached > 1]
        left, counts = PROMPT_TOKENS, {}
        for i, row in enumerate(sorted(reading, key=lambda row: row.length - row.cached)):
            counts[row] = min(row.length - row.cached, max(1, left // (len(reading) - i)))
            left -= counts[row]
        shares: list[_Share] = []
        waiting: set[_Row] = set()
        for row in self._rows:
            if row in waiting:
                continue
            if self._anew_past is not None and row.length > self._anew_past and not row.read_as_long:
                self._give_back([row])
                row.read_as_long = True
                counts[row] = min(row.length, PROMPT_TOKENS)
            count = counts.get(row, 1)
            self._provide(row, row.cached + count, waiting)
            if row not in waiting:
                shares.append((row, row.next(count)))
        shares.sort(key=lambda share: share[1].group())
        return shares

    def _provide(self, row: _Row, tokens: int, waiting: set[_Row]) -> None:
        """Have the row's blocks reach for so many tokens, by taking those of the youngest rows if need be."""
        lack = blocks_for(tokens) - len(row.blocks)
        if lack <= 0:
            return
        younger = [other for other in self._rows[self._rows.index(row) + 1 :] if other.blocks]
        while lack > self._pages.free and younger:
            victim = younger.pop()
            self._give_back([victim])
            waiting.add(victim)
            self.preempted += 1
        if lack > self._pages.free:  # older rows have them: it waits
            waiting.add(row)
        else:
            first = len(row.blocks)
            row.blocks += self._pages.take(lack)
            new = torch.tensor(row.blocks[first:], pin_memory=self._tables.is_cuda)
            self._tables[row.place, first : first + lack].copy_(new, non_blocking=True)

    def _give_back(self, rows: Sequence[_Row]) -> None:
        self._pages.give_back([block for row in rows for block in row.blocks])
        for row in rows:
            row.blocks, row.cached = [], 0

    def _advance(self, shares: Sequence[_Share]) -> tuple[list[Request], Tensor]:
        parts = [part for _, part in shares]
        counts = [len(part.ids) for part in parts]
        ready = [part.total == part.length for part in parts]
        picked = [end - 1 for end, is_ready in zip(accumulate(counts), ready, strict=True) if is_ready]
        steady = max(counts) == 1
        self._enter_use([row.request for row, _ in shares], None if steady else counts, picked)
        self.failed += 1  # until it has succeeded
        logits = self._replayed(parts, shares) if steady else None
        if logits is None:
            logits = self._forward(Layout(parts, self._tables, self._pages), None if steady else picked)
        self.failed, self.succeeded = self.failed - 1, self.succeeded + 1
        for row, part in shares:
            row.cached = part.length
        return [row.request for (row, _), is_ready in zip(shares, ready, strict=True) if is_ready], logits

    def _advance_apart(self, shares: Sequence[_Share]) -> tuple[list[Request], Tensor] | None:
        """A step that failed again, in halves, and their halves, until those who fail by themselves are found."""
        middle, done = len(shares) // 2, []
        for part in (shares[:middle], shares[middle:]) if middle else (shares,):
            try:
                done.append(self._advance(part))
            except Exception as error:
                if not middle or device_lost(error):
                    for row, _ in part:
                        row.request.finish("error", error)
                elif (found := self._advance_apart(part)) is not None:
                    done.append(found)
        self._leave_use()
        self.leave()
        if not done:
            return None
        return [request for requests, _ in done for request in requests], torch.cat([logits for _, logits in done])

    def _enter_use(self, requests: list[Request], lengths: list[int] | None, picked: list[int]) -> None:
        if lengths is None and self._in_use == requests:
            return
        self._leave_use()
        counts = [1] * len(requests) if lengths is None else lengths
        chosen = None if lengths is None else picked or [0]
        self._use.enter_context(self._bank.use([request.lease for request in requests], counts, chosen))
        self._in_use = requests if lengths is None else None

    def _leave_use(self) -> None:
        self._use.close()
        self._in_use = None

    def _replayed(self, parts: Sequence[Part], shares: Sequence[_Share]) -> Tensor | None:
        """The logits by a captured step, or None."""
        leases = [row.request.lease for row, _ in shares]
        return self._captured.step(parts, [-1 if lease is None else lease.adapter.in_slot() for lease in leases])

    def _logits(self, layout: Layout, **more: Any) -> Tensor:
        with running(self._configs, layout), row_by_row(self._ropes, layout):
            return run(self._model, layout, **more).logits[0]

    def _forward(self, layout: Layout, picked: list[int] | None) -> Tensor:
        more: dict[str, Any] = {}
        index = None if picked is None else torch.tensor(picked, dtype=torch.long, device=self._device)
        if index is not None and self._picks:
            # A model takes no empty choice; nobody's logits are then those of the first token.
            more["logits_to_keep"] = index if picked else index.new_zeros(1)
        logits = self._logits(layout, **more)
        if index is None:
            return logits
        return logits[: len(index)] if self._picks else logits[index]
