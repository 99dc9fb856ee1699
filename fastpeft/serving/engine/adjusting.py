"""What changes a row's logits before a token is chosen: bias, penalties, and ends that are held back."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .request import Request


def adjusted(logits: Tensor, requests: Sequence[Request]) -> Tensor:
    """The logits with each row's bias and penalties; the same tensor where no row has any.

    ``repetition_penalty`` is transformers' and vLLM's, of prompt and answer; ``presence_penalty`` and
    ``frequency_penalty`` are OpenAI's, of the answer. Only the numbers of tokens that a row concerns are read.

    Args:
        logits: ``[B, V]``, any float dtype; not modified.
        requests: whose rows they are, B of them.

    Returns:
        ``[B, V]``, float32 where a row has changed.
    """
    rows = [i for i, request in enumerate(requests) if request.params.adjusts]
    if not rows:
        return logits
    logits = logits.float().clone()
    concerned = [_concerned(requests[i]) for i in rows]
    lengths = torch.tensor([len(each.ids) for each in concerned])
    place = torch.repeat_interleave(torch.tensor(rows), lengths).to(logits.device)
    ids, times, bias = (
        torch.cat([getattr(each, name) for each in concerned]).to(logits.device) for name in ("ids", "times", "bias")
    )

    def setting(name: str) -> Tensor:
        values = torch.tensor([getattr(requests[i].params, name) for i in rows], dtype=torch.float32)
        return torch.repeat_interleave(values, lengths).to(logits.device)

    value = logits[place, ids] + bias
    repetition = setting("repetition_penalty")
    value = torch.where(times >= 0, torch.where(value > 0, value / repetition, value * repetition), value)
    value -= setting("frequency_penalty") * times.clamp(min=0) + setting("presence_penalty") * (times > 0)
    logits[place, ids] = value
    held = [
        (i, token)
        for i in rows
        if len(requests[i].tokens) < requests[i].params.min_tokens
        for token in requests[i].stop_ids
        if token < logits.shape[1]
    ]
    if held:
        at = torch.tensor(held, device=logits.device)
        logits[at[:, 0], at[:, 1]] = -torch.inf
    return logits


class Concerned:
    """The tokens of one request whose logits may change, each once.

    Attributes:
        ids: int64.
        times: float32, how often each was generated; -1 for one that is neither in the prompt nor generated.
        bias: float32.
    """

    def __init__(self, request: Request):
        params, prompt = request.params, set(request.prompt)
        if params.repetition_penalty == 1.0:
            prompt = set()
        known = [*prompt, *(token for token in params.logit_bias if token not in prompt)]
        self._place = {token: i for i, token in enumerate(known)}
        self._read = 0
        self.ids = torch.tensor(known, dtype=torch.int64)
        self.times = torch.tensor([0.0 if token in prompt else -1.0 for token in known])
        self.bias = torch.tensor([params.logit_bias.get(token, 0.0) for token in known])

    def follow(self, tokens: Sequence[int]) -> None:
        """Count the tokens that have come since the last call."""
        for token in tokens[self._read :]:
            place = self._place.setdefault(token, len(self._place))
            if place == len(self.ids):
                self.ids = torch.cat([self.ids, torch.tensor([token])])
                self.times = torch.cat([self.times, torch.zeros(1)])
                self.bias = torch.cat([self.bias, torch.zeros(1)])
            self.times[place] = self.times[place].clamp(min=0) + 1
        self._read = len(tokens)


def _concerned(request: Request) -> Concerned:
    if request.concerned is None:
        request.concerned = Concerned(request)
    request.concerned.follow(request.tokens)
    return request.concerned
