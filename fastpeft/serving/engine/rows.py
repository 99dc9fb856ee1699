"""Which rows a batcher has: over a paged cache, or, where the model cannot be served so, over one of its own kind."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..bank.bank import AdapterBank
from .memory import cache_bytes
from .padded_rows import PaddedRows
from .paged_model import unpaged_reason
from .paged_rows import PagedRows
from .pages import LayerShape, token_bytes
from .request import Request
from .row_rope import length_dependent


class Rows(Protocol):
    """Requests that run, each with its lease; ``paged_rows`` and ``padded_rows`` have the two kinds."""

    kind: str
    succeeded: int
    failed: int

    @property
    def requests(self) -> list[Request]:
        """In the order in which they joined."""
        raise NotImplementedError

    def has_room(self, request: Request, others: Sequence[Request]) -> bool:
        """Whether the cache reaches for it beside the others."""
        raise NotImplementedError

    def join(self, requests: Sequence[Request]) -> Tensor | None:
        """New rows, the last ones then; their logits where that reads their prompts, else None."""
        raise NotImplementedError

    def step(self) -> tuple[list[Request], Tensor] | None:
        """The requests that have a next token, and its logits; rows that fail end in error, and leave."""
        raise NotImplementedError

    def probe(self) -> None:
        """Read one token with the bare model. Raises what the model raises."""
        raise NotImplementedError

    def leave(self) -> None:
        """Let the rows go whose requests have ended."""
        raise NotImplementedError

    def clear(self, reason: str, error: BaseException | None = None) -> None:
        """End every row."""
        raise NotImplementedError


def make_rows(bank: AdapterBank, max_rows: int, max_tokens: int, max_cached: int | None) -> tuple[Any, int]:
    """The rows for the bank's model, and how many tokens the cache may hold.

    Args:
        bank: around the model.
        max_rows: how many rows run at once.
        max_tokens: of the longest.
        max_cached: tokens; None is what the rows could need, as far as a share of the free memory holds it.

    Raises:
        ValueError: rows cannot join and leave the model's kind of cache, or they would depend on each other.
    """
    model: Any = bank.model
    with bank.use([None]):
        new_cache, shapes = _cache_kind(model, bank.device)
        reason = unpaged_reason(model, shapes, bank.device)
    if reason is not None and length_dependent(model):
        name = f"model is {type(model).__name__}, whose rotary embedding depends on the longest row"
        raise ValueError(f"Batcher: {name}, expected one with a paged cache, but {reason}")
    if max_cached is None:
        most = cache_bytes(bank.device, _promised_bytes(bank)) // token_bytes(shapes)
        max_cached = max(1, min(max_rows * max_tokens, most))
    if reason is not None:
        return PaddedRows(bank, new_cache, max_cached, reason), max_cached
    return PagedRows(bank, shapes, max_rows, min(max_tokens, max_cached), max_cached), max_cached


def _promised_bytes(bank: AdapterBank) -> int:
    """Memory that the slots will take once adapters have touched every layer, without what they have taken."""
    return sum(site.slot_bytes(bank.max_rank) for site in bank._sites if site.lora_a is None) * bank.slots


def _cache_kind(model: Any, device: torch.device) -> tuple[Callable[[], Any], list[LayerShape]]:
    """The class of the model's cache, if rows can be put together and taken apart in it, and what its layers keep."""
    ids = torch.zeros(1, 2, dtype=torch.long, device=device)
    kind: Any = type(getattr(model(input_ids=ids, use_cache=True), "past_key_values", None))
    cache = None
    with contextlib.suppress(Exception):
        cache = kind()
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    layers = getattr(cache, "layers", ())
    pairs: list[tuple[Any, Any]] = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in layers]
    plain = all(isinstance(t, Tensor) and t.dim() == 4 and t.shape[2] == 2 for pair in pairs for t in pair)
    if cache is None or not pairs or not plain:
        given = f"{type(model).__name__} with a {kind.__name__}"
        raise ValueError(f"Batcher: model is {given}, expected one whose cache is keys and values of each layer")
    return kind, [LayerShape(*pair) for pair in pairs]
