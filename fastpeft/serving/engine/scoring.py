"""Log-probabilities of a prompt's own tokens, as evaluations ask for them."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..bank.bank import AdapterBank
from .logprobs import TokenLogprobs, of_rows
from .memory import device_lost
from .request import Request
from .sampling import next_tokens

_CHUNK = 256  # prompt tokens whose logits are in memory at once


def score_prompts(bank: AdapterBank, requests: Sequence[Request]) -> list[Request]:
    """Read the prompts of those that ask for ``prompt_logprobs``, one by one; a second error ends that request alone.

    A request for one token has it then, too, and is done.

    Args:
        bank: around the model.
        requests: with leases on their adapters.

    Returns:
        Those that are not done.
    """
    for request in requests:
        if request.params.prompt_logprobs is None or request.prompt_logprobs:
            continue  # or it was put out for a while
        try:
            request.prompt_logprobs, last = _read_or_again(bank, request, request.params.prompt_logprobs)
            if request.max_new_tokens == 1 and (token := next_tokens(last, [request])[0]) is not None:
                request.take(token)
        except Exception as error:
            request.finish("error", error)
    return [request for request in requests if not request.done]


def _read_or_again(*given: Any) -> tuple[list[TokenLogprobs | None], Tensor]:
    try:
        return _read(*given)
    except Exception as error:
        if device_lost(error):
            raise
    return _read(*given)


def _read(bank: AdapterBank, request: Request, count: int) -> tuple[list[TokenLogprobs | None], Tensor]:
    """Of each token, None for the first; and the logits for the next."""
    model: Any = bank.model
    keeps = {"logits_to_keep": 0} if "logits_to_keep" in inspect.signature(type(model).forward).parameters else {}
    found: list[TokenLogprobs | None] = [None]
    logits, cache = torch.empty(0), None
    with bank.use([request.lease]):
        for start in range(0, len(request.prompt), _CHUNK):
            ids = torch.tensor([request.prompt[start : start + _CHUNK]], device=bank.device)
            output = model(input_ids=ids, past_key_values=cache, use_cache=True, **keeps)
            logits, cache = output.logits[0], output.past_key_values
            following = request.prompt[start + 1 : start + 1 + _CHUNK]
            if following:
                found += of_rows(logits[: len(following)], following, count)
    return found, logits[-1:]
