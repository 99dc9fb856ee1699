"""Log-probabilities of tokens, as the model gives them: before bias, penalties and temperature."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .request import Request


@dataclass(frozen=True)
class TokenLogprobs:
    """One token's.

    Attributes:
        token: its id.
        logprob: its own.
        top: ids and log-probabilities of the most probable tokens in its place, the most probable first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def note_logprobs(logits: Tensor, tokens: Sequence[int | None], requests: Sequence[Request]) -> None:
    """Leave those of the tokens that were chosen with the requests that ask for them, in ``next_logprobs``.

    Args:
        logits: ``[B, V]``, any float dtype.
        tokens: B of them; None where there is none.
        requests: whose rows they are.
    """
    for row, token, request in zip(logits, tokens, requests, strict=True):
        if request.params.logprobs is not None and token is not None:
            (request.next_logprobs,) = of_rows(row[None], [token], request.params.logprobs)


def of_rows(logits: Tensor, tokens: Sequence[int], count: int) -> list[TokenLogprobs]:
    """Of a token in each row, and ``count`` of the most probable ones.

    Args:
        logits: ``[n, V]``, any float dtype.
        tokens: n of them.
        count: how many beside.
    """
    logprobs = torch.log_softmax(logits, -1, dtype=torch.float32)
    own = logprobs.gather(-1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    values, ids = logprobs.topk(min(count, logits.shape[1]))
    return [
        TokenLogprobs(token, logprob, tuple(zip(places, tops, strict=True)))
        for token, logprob, places, tops in zip(tokens, own, ids.tolist(), values.tolist(), strict=True)
    ]
