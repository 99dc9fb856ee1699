"""The next token of every row, each row by its own settings and its own generator."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .request import Request


def next_tokens(logits: Tensor, requests: Sequence[Request]) -> list[int | None]:
    """Greedy where the temperature is 0, else drawn from the smallest set of tokens with probability ``top_p``.

    A row draws one number in [0, 1) from its generator and takes the token where the cumulated probabilities pass it,
    which are in the vocabulary's order where ``top_p`` is 1, and largest first where it is less: the same seed and
    logits give the same token in every batch.

    Args:
        logits: ``[B, V]``, any float dtype.
        requests: whose rows they are, B of them.

    Returns:
        Token ids; None for a row with NaN among its logits.
    """
    tokens = logits.argmax(-1)
    drawn = [i for i, request in enumerate(requests) if request.temperature > 0]
    for rows, draw in (
        ([i for i in drawn if requests[i].top_p == 1], _draw),
        ([i for i in drawn if requests[i].top_p < 1], _draw_from_the_top),
    ):
        if rows:
            # NaN makes no distribution; the row is dropped below.
            tokens[rows] = draw(logits[rows].nan_to_num(), [requests[i] for i in rows])
    bad = torch.isnan(logits).any(-1)
    return [None if nan else token for token, nan in zip(tokens.tolist(), bad.tolist(), strict=True)]


def _draw(logits: Tensor, requests: Sequence[Request]) -> Tensor:
    return _pick(_probability(logits, requests), requests)[:, 0]


def _draw_from_the_top(logits: Tensor, requests: Sequence[Request]) -> Tensor:
    top_p = _column([request.top_p for request in requests], logits)
    probability, order = _probability(logits, requests).sort(dim=-1, descending=True, stable=True)
    probability = probability.masked_fill(probability.cumsum(-1) - probability >= top_p, 0.0)
    probability[:, 0] = probability[:, 0].clamp(min=torch.finfo(torch.float32).tiny)
    return order.gather(-1, _pick(probability, requests))[:, 0]


def _probability(logits: Tensor, requests: Sequence[Request]) -> Tensor:
    logits = logits.float() - logits.float().amax(-1, keepdim=True)  # tiny temperatures then give -inf, never +inf
    return (logits / _column([request.temperature for request in requests], logits)).softmax(-1)


def _pick(probability: Tensor, requests: Sequence[Request]) -> Tensor:
    """``[B, 1]``: the first place where the cumulated probabilities pass each row's number."""
    cumulated = probability.cumsum(-1)
    total = cumulated[:, -1:]
    u = _column([torch.rand((), generator=request.generator).item() for request in requests], probability)
    # u * total may round up to the total, which nothing passes: the last place that adds to it is meant then.
    last = (cumulated < total).sum(-1, keepdim=True)
    return torch.minimum(torch.searchsorted(cumulated, u * total, right=True), last)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, device=like.device, dtype=torch.float32)[:, None]
