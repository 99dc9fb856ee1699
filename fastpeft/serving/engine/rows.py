"""The rows of a running batch and their KV cache: rows join after their prompt, take a step together, and leave.

Rows are padded on the left to one length, with an attention mask and positions of their own. The cache is the model's
own kind; it must be a plain one, keys and values ``[B, heads, L, D]`` for every layer.
"""

import contextlib
import inspect
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..bank.bank import AdapterBank
from .request import Request


class Rows:
    """Requests that run, each with its lease, and what the model remembers of them."""

    def __init__(self, bank: AdapterBank):
        self.requests: list[Request] = []
        self._bank, self._model, self._device = bank, bank.model, bank.device
        self._cache, self._length = None, 0
        self._use = contextlib.ExitStack()  # the bank's batch of these rows, kept from step to step
        self._in_use = False
        self._takes = inspect.signature(type(self._model).forward).parameters
        with bank.use([None]):
            self._new_cache = _cache_kind(self._model, self._device)

    def join(self, requests: Sequence[Request]) -> Tensor:
        """Read the prompts of new rows; ``[n, V]``, their logits for the first token. They are the last rows then.

        An error leaves the rows that run as they were.
        """
        length = max(len(request.prompt) for request in requests)
        cache, pads = self._new_cache(), [length - len(request.prompt) for request in requests]
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

    def step(self) -> Tensor:
        """One token on for every row: ``[B, V]``."""
        if not self._in_use:
            self._use.enter_context(self._bank.use([request.lease for request in self.requests]))
            self._in_use = True
        ids = [[request.tokens[-1]] for request in self.requests]
        pads = [self._length + 1 - len(r.prompt) - len(r.tokens) for r in self.requests]
        logits = self._forward(ids, pads, self._cache, self._length + 1)
        self._length += 1
        return logits

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

    def _forward(self, ids: Sequence[Sequence[int]], pads: Sequence[int], cache: object, length: int) -> Tensor:
        ids = torch.tensor(ids, device=self._device)
        pad = torch.tensor(pads, device=self._device)[:, None]
        column = torch.arange(length, device=self._device)
        positions = (column[length - ids.shape[1] :] - pad).clamp(min=0)
        more = {"logits_to_keep": 1, "position_ids": positions}
        output = self._model(
            input_ids=ids,
            attention_mask=(column >= pad).long() if any(pads) else None,
            past_key_values=cache,
            use_cache=True,
            **{name: value for name, value in more.items() if name in self._takes},
        )
        return output.logits[:, -1]


def _cache_kind(model: nn.Module, device: torch.device):
    """The class of the model's cache, if rows can be put together and taken apart in it."""
    ids = torch.zeros(1, 2, dtype=torch.long, device=device)
    kind = type(getattr(model(input_ids=ids, use_cache=True), "past_key_values", None))
    cache = None
    with contextlib.suppress(Exception):
        cache = kind()
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    layers = getattr(cache, "layers", None) or [None]
    plain = all(isinstance(t, Tensor) and t.dim() == 4 and t.shape[2] == 2 for layer in layers for t in _kv(layer))
    if cache is None or not plain:
        given = f"{type(model).__name__} with a {kind.__name__}"
        raise ValueError(f"Batcher: model is {given}, expected one whose cache is keys and values of each layer")
    return kind


def _kv(layer: object) -> tuple[object, object]:
    return getattr(layer, "keys", None), getattr(layer, "values", None)


def _pad(t: Tensor, length: int) -> Tensor:
    return nn.functional.pad(t, (0, 0, length - t.shape[2], 0)) if t.shape[2] < length else t
