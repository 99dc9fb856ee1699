"""The next token of every row, each row by its own settings and its own generator."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .request import Request


def next_tokens(logits: Tensor, requests: Sequence[Request]) -> list[int | None]:
    """Greedy where the temperature is 0, else drawn from the smallest set of tokens with probability ``top_p``.

    A row draws one number in [0, 1) from its generator and takes the token where the cumulated probabilities, largest
    first, pass it: the same seed and logits give the same token in every batch.

    Args:
        logits: ``[B, V]``, any float dtype.

    Returns:
        Token ids; None for a row with NaN among its logits.
    """
    tokens = logits.argmax(-1)
    drawn = [i for i, request in enumerate(requests) if request.temperature > 0]
    if drawn:
        # NaN makes no distribution; the row is dropped below.
        tokens[drawn] = _draw(logits[drawn].nan_to_num(), [requests[i] for i in drawn])
    bad = torch.isnan(logits).any(-1)
    return [None if nan else token for token, nan in zip(tokens.tolist(), bad.tolist(), strict=True)]


def _draw(logits: Tensor, requests: Sequence[Request]) -> Tensor:
    column = {"device": logits.device, "dtype": torch.float32}
    temperature = torch.tensor([request.temperature for request in requests], **column)
    top_p = torch.tensor([request.top_p for request in requests], **column)
    logits = logits.float() - logits.float().amax(-1, keepdim=True)  # tiny temperatures then give -inf, never +inf
    probability, order = (logits / temperature[:, None]).softmax(-1).sort(dim=-1, descending=True, stable=True)
    cumulated = probability.cumsum(-1)
    probability = probability.masked_fill(cumulated - probability >= top_p[:, None], 0.0)
    probability[:, 0] = probability[:, 0].clamp(min=torch.finfo(torch.float32).tiny)
    cumulated = probability.cumsum(-1)
    u = torch.tensor([torch.rand((), generator=request.generator).item() for request in requests], **column)
    index = torch.searchsorted(cumulated, (u * cumulated[:, -1])[:, None], right=True)
    kept = (probability > 0).sum(-1, keepdim=True)
    return order.gather(-1, torch.minimum(index, kept - 1))[:, 0]
