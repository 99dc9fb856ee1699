"""The rows of a running batch over a cache of the model's own kind, where a paged one cannot be.

Rows join after their prompt, take a step together, and leave. They are padded on the left to one length, with an
attention mask and positions of their own. The cache is a plain one, keys and values ``[B, heads, L, D]`` for every
layer.

A step that fails is taken back and repeated: without the youngest row where memory ran out, else in halves, until the
rows are found that fail by themselves, twice. They end; nobody else does. Where the device is lost nothing is repeated.
"""

import contextlib
import inspect
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..bank.bank import AdapterBank
from .memory import device_lost, out_of_memory
from .request import Request

_PREFILL_TOKENS = 4096  # padded prompt tokens that are read at once between two steps


class PaddedRows:
    """Requests that run, each with its lease, and what the model remembers of them.

    Args:
        bank: around the model.
        new_cache: makes one of the model's kind.
        max_cached: rows times the longest of them, in tokens.
        reason: why the cache is not paged.

    Attributes:
        kind: "padded", and the reason
        requests: in the order in which they joined.
        succeeded, failed: how many forwards did, so far.
    """

    def __init__(self, bank: AdapterBank, new_cache: Callable[[], Any], max_cached: int, reason: str):
        self.kind = f"padded ({reason}):"
        self.requests: list[Request] = []
        self.succeeded = self.failed = 0
        self._bank, self._model, self._device = bank, bank.model, bank.device
        self._cache: Any = None
        self._length = 0
        self._use = contextlib.ExitStack()  # the bank's batch of these rows, kept from step to step
        self._in_use = False
        self._takes = inspect.signature(type(self._model).forward).parameters
        self._new_cache, self._max_cached = new_cache, max_cached

    def has_room(self, request: Request, others: Sequence[Request]) -> bool:
        """Whether the cache reaches for it and the others, all as long as the longest may come to be."""
        rows = [*others, request]
        joining = [r for r in rows if r not in self.requests]
        read = max(len(r.prompt) for r in joining) * len(joining)
        cached = max(len(r.prompt) + r.max_new_tokens for r in rows) * len(rows)
        return cached <= self._max_cached and (len(joining) == 1 or read <= _PREFILL_TOKENS)

    def join(self, requests: Sequence[Request]) -> Tensor:
        """Read the prompts of new rows; ``[n, V]``, their logits for the first token. They are the last rows then.

        An error leaves the rows that run as they were.
        """
        length = max(len(request.prompt) for request in requests)
        cache: Any = self._new_cache()
        pads = [length - len(request.prompt) for request in requests]
        ids = [[0] * pad + request.prompt for pad, request in zip(pads, requests, strict=True)]
        with self._bank.use([request.lease for request in requests]):
            logits = self._forward(ids, pads, cache, length)
        self._leave_use()
        longest = max(length, self._length)
        if self.requests:
            merged = [
                tuple(torch.cat([_pad(a, longest), _pad(b, longest)]) for a, b in zip(_kv(old), _kv(new), strict=True))
                for old, new in zip(self._cache.layers, cache.layers, strict=True)
            ]
            for layer, (keys, values) in zip(self._cache.layers, merged, strict=True):
                layer.keys, layer.values = keys, values
        else:
            self._cache = cache
        self._length = longest
        self.requests += requests
        return logits

    def step(self) -> tuple[list[Request], Tensor] | None:
        """One token on for every row: the requests and their logits ``[B, V]``; or None if no row is left.

        Rows that fail end in error, and leave.
        """
        while self.requests:
            try:
                return self.requests, self._advance()
            except Exception as failure:
                error = failure
            traceback.clear_frames(error.__traceback__)  # which hold the step's tensors
            self._leave_use()
            self._take_back()
            if device_lost(error):
                self.clear("error", error)
                break
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            if len(self.requests) == 1 or not out_of_memory(error):
                logits = self._advance_apart()
                return None if logits is None else (self.requests, logits)
            self.requests[-1].finish("error", error)
            self.leave()
        return None

    def probe(self) -> None:
        """Read one token with the bare model. Raises what the model raises."""
        with self._bank.use([None]):
            self._forward([[0]], [0], self._new_cache(), 1)

    def _advance(self) -> Tensor:
        if not self._in_use:
            self._use.enter_context(self._bank.use([request.lease for request in self.requests]))
            self._in_use = True
        logits = self._next(self.requests, self._cache)
        self._length += 1
        return logits

    def _next(self, requests: Sequence[Request], cache: Any) -> Tensor:
        ids = [[request.tokens[-1]] for request in requests]
        pads = [self._length + 1 - len(request.prompt) - len(request.tokens) for request in requests]
        return self._forward(ids, pads, cache, self._length + 1)

    def _take_back(self) -> None:
        """Take from the cache what a step that failed has written to some of its layers."""
        for layer in self._cache.layers:
            layer.keys, layer.values = (t[:, :, : self._length] for t in _kv(layer))

    def _advance_apart(self) -> Tensor | None:
        """The step in parts, each with a copy of its rows' cache; the parts that succeed are the rows from now on."""
        done: list[tuple[list[Request], Tensor, Any]] = []

        def attempt(places: list[int], last: bool) -> None:
            part = [self.requests[i] for i in places]
            index = torch.tensor(places, device=self._device)
            try:
                cache = self._new_cache()
                for i, layer in enumerate(self._cache.layers):
                    cache.update(*(t.index_select(0, index) for t in _kv(layer)), i)
                with self._bank.use([request.lease for request in part]):
                    done.append((part, self._next(part, cache), cache))
            except Exception as error:
                if last or device_lost(error):
                    for request in part:
                        request.finish("error", error)
                    return
            else:
                return
            halves(places)

        def halves(places: list[int]) -> None:
            middle = len(places) // 2
            for part in (places[:middle], places[middle:]) if middle else (places,):
                attempt(part, last=not middle)

        halves(list(range(len(self.requests))))
        if not done:
            self.requests, self._cache, self._length = [], None, 0
            return None
        for layer, *parts in zip(self._cache.layers, *(cache.layers for *_, cache in done), strict=True):
            layer.keys, layer.values = (torch.cat(pieces) for pieces in zip(*map(_kv, parts), strict=True))
        self.requests = [request for part, *_ in done for request in part]
        self._length += 1
        return torch.cat([logits for _, logits, _ in done])

    def leave(self) -> None:
        """Let the rows go whose requests have ended, and the columns that no row needs."""
        stay = [i for i, request in enumerate(self.requests) if not request.done]
        if len(stay) == len(self.requests):
            return
        self._leave_use()
        self.requests = [self.requests[i] for i in stay]
        if not stay:
            self._cache, self._length = None, 0
            return
        length = max(len(r.prompt) + len(r.tokens) - 1 for r in self.requests)
        index = torch.tensor(stay, device=self._device)
        for layer in self._cache.layers:
            layer.keys, layer.values = (t[:, :, t.shape[2] - length :].index_select(0, index) for t in _kv(layer))
        self._length = length

    def clear(self, reason: str, error: BaseException | None = None) -> None:
        """End every row."""
        self._leave_use()
        for request in self.requests:
            request.finish(reason, error)
        self.requests, self._cache, self._length = [], None, 0

    def _leave_use(self) -> None:
        self._use.close()
        self._in_use = False

    def _forward(self, ids: Sequence[Sequence[int]], pads: Sequence[int], cache: Any, length: int) -> Tensor:
        tokens = torch.tensor(ids, device=self._device)
        pad = torch.tensor(pads, device=self._device)[:, None]
        column = torch.arange(length, device=self._device)
        positions = (column[length - tokens.shape[1] :] - pad).clamp(min=0)
        more = {"logits_to_keep": 1, "position_ids": positions}
        self.failed += 1  # until it has succeeded
        output = self._model(
            input_ids=tokens,
            attention_mask=(column >= pad).long() if any(pads) else None,
            past_key_values=cache,
            use_cache=True,
            **{name: value for name, value in more.items() if name in self._takes},
        )
        self.failed, self.succeeded = self.failed - 1, self.succeeded + 1
        return output.logits[:, -1]


def _kv(layer: object) -> tuple[Any, Any]:
    return getattr(layer, "keys", None), getattr(layer, "values", None)


def _pad(t: Tensor, length: int) -> Tensor:
    return nn.functional.pad(t, (0, 0, length - t.shape[2], 0)) if t.shape[2] < length else t
