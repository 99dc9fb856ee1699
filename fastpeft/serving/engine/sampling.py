"""The next token of every row, each row by its own settings and its own generator."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .adjusting import adjusted
from .logprobs import note_logprobs
from .request import Request

# Probabilities are counted in units of 2^-38, as integers: their sums are exact in any order, so that neither the
# device nor the other rows have a say in a draw. A total times a number of 24 bits still fits 64.
_UNITS, _DRAW_BITS = 2.0**38, 24


def next_tokens(logits: Tensor, requests: Sequence[Request]) -> list[int | None]:
    """Greedy where the temperature is 0, else drawn from what ``top_k``, ``top_p`` and ``min_p`` leave.

    A row draws one number in [0, 1) from its generator and takes the token where the cumulated probabilities pass it,
    which are in the vocabulary's order where ``top_p`` is 1, and largest first where it is less: the same seed and
    logits give the same token in every batch. Which tokens are left is what transformers' TopKLogitsWarper,
    TopPLogitsWarper and MinPLogitsWarper leave, one after the other; those take one setting for all rows, and sort the
    vocabulary for ``min_p`` too.

    Args:
        logits: ``[B, V]``, any float dtype.
        requests: whose rows they are, B of them; those that ask for log-probabilities have ``next_logprobs`` then.

    Returns:
        Token ids; None for a row with NaN among its logits, or with -inf alone.
    """
    given, logits = logits, adjusted(logits, requests)
    best, tokens = logits.max(-1)  # NaN where there is one
    drawn = [i for i, request in enumerate(requests) if request.params.temperature > 0]
    if len(drawn) == len(requests):
        tokens = _draw(logits, requests)
    elif drawn:
        tokens[drawn] = _draw(logits[drawn], [requests[i] for i in drawn])
    found = torch.where(best > -torch.inf, tokens, -1)  # which NaN is not
    if found.is_cuda:  # one copy, and one wait for it
        found = torch.empty_like(found, device="cpu", pin_memory=True).copy_(found, non_blocking=True)
        torch.cuda.current_stream(logits.device).synchronize()
    chosen = [None if token < 0 else token for token in found.tolist()]
    note_logprobs(given, chosen, requests)
    return chosen


def _draw(logits: Tensor, requests: Sequence[Request]) -> Tensor:
    total, units = _units(logits, requests)
    drawn = torch.tensor([torch.rand((), generator=request.generator).item() for request in requests])
    u = (drawn * 2.0**_DRAW_BITS).to(torch.int64)[:, None].to(logits.device)
    some = [i for i, request in enumerate(requests) if request.params.top_p < 1]
    if not some:
        return _pick(units, u)
    limits = torch.tensor([requests[i].params.top_p for i in some], dtype=torch.float64)[:, None]
    limits = limits.to(logits.device) * total[some]
    every = [i for i, request in enumerate(requests) if request.params.top_p == 1]
    tokens = torch.empty(len(requests), dtype=torch.int64, device=logits.device)
    if every:
        tokens[every] = _pick(units[every], u[every])
    if logits.device.type == "cpu":
        for i, limit in zip(some, limits, strict=True):
            tokens[i] = _pick_from_the_top_of(units[i], limit, u[i], requests[i].params.top_p)
    else:
        tokens[some] = _pick_from_the_top(units[some], limits, u[some])
    return tokens


def _units(logits: Tensor, requests: Sequence[Request]) -> tuple[Tensor, Tensor]:
    """Of the probabilities at each temperature: ``[B, 1]``, their sums; ``[B, V]``, without what min_p excludes."""
    params = [request.params for request in requests]
    x = logits.to(torch.float32, copy=True).nan_to_num_(neginf=-torch.inf)  # NaN makes no distribution
    if any(p.temperature != 1 for p in params):
        x -= x.amax(-1, keepdim=True)  # tiny temperatures then give -inf, never +inf
        x /= _column([p.temperature for p in params], x)
    if any(0 < p.top_k < x.shape[1] for p in params):
        counts = [p.top_k if 0 < p.top_k < x.shape[1] else 0 for p in params]
        last = x.topk(max(counts)).values.gather(-1, _column([max(k - 1, 0) for k in counts], x).long())
        x.masked_fill_(x < last.masked_fill(_column(counts, x) == 0, -torch.inf), -torch.inf)
    units = x.softmax(-1).mul_(_UNITS).to(torch.int64)
    total = units.sum(-1, keepdim=True)
    if any(p.min_p > 0 for p in params):
        least = _column([p.min_p for p in params], x).double() * units.amax(-1, keepdim=True)
        units.masked_fill_(units < least, 0)
    return total, units


def _pick(units: Tensor, u: Tensor) -> Tensor:
    """``[B]``: the first place where the cumulated units pass each row's share ``u / 2^24`` of them all."""
    cumulated = units.cumsum(-1)
    place = torch.searchsorted(cumulated, (cumulated[:, -1:] * u) >> _DRAW_BITS, right=True)
    return place[:, 0].clamp(max=units.shape[1] - 1)


def _pick_from_the_top(units: Tensor, limits: Tensor, u: Tensor) -> Tensor:
    """Likewise, of the largest alone that have ``limits`` units together, largest first."""
    ordered, order = units.sort(dim=-1, descending=True, stable=True)
    beyond = ordered.cumsum(-1) - ordered >= limits
    beyond[:, 0] = False
    return order.gather(-1, _pick(ordered.masked_fill(beyond, 0), u)[:, None])[:, 0]


def _pick_from_the_top_of(units: Tensor, limit: Tensor, u: Tensor, top_p: float) -> Tensor:
    """The same for one row, sorting only what can be among the largest.

    All that are smaller than an equal share of what may be left out are, together, less than that.
    """
    least = (1 - top_p) * _UNITS / (2 * len(units))
    able = (units >= min(least, float(units.max()))).nonzero()[:, 0]
    return able[_pick_from_the_top(units[able][None], limit[None], u[None])[0]]


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, device=like.device, dtype=torch.float32)[:, None]
