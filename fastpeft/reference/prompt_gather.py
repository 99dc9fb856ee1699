"""Learned prompts in front of token embeddings, in plain PyTorch: the definition, and the steps of every backend.

Row b of the output is ``[prompt of row b, tokens of row b]``, and padding on one side up to the width W. A row's tokens
are what lies between the first and the last position at which its attention mask is not 0, so that its own padding
never comes between its prompt and its tokens. Shapes: ``prompts [S, D]``, all prompts one below the other,
``lengths[p]`` rows for prompt p; ``x [B, T, D]``; outputs ``[B, W, D]`` and ``[B, W]``.

``prompt_gather`` is what the op means; autograd differentiates it. The steps below it are what runs on a CPU.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

Gathered = tuple[Tensor, Tensor, Tensor, Tensor]


def prompt_gather(
    prompts: Tensor,
    lengths: Sequence[int],
    prompt_ids: Sequence[int],
    x: Tensor,
    width: int,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    position_ids: Tensor | None = None,
    left: bool = False,
    ignore_index: int = -100,
) -> Gathered:
    """Padded embeddings ``[B, W, D]``, attention mask, positions and labels ``[B, W]`` (Lester et al., 2021).

    Args:
        prompts: all prompts ``[S, D]``, one below the other.
        lengths: the rows of each prompt, S together.
        prompt_ids: the number of each row's prompt, -1 for no prompt.
        x: the tokens' embeddings ``[B, T, D]``.
        width: W, at least the longest row's prompt and tokens.
        attention_mask: ``[B, T]`` integers, or None for all ones.
        labels: ``[B, T]`` integers, or None for ``ignore_index`` everywhere.
        position_ids: ``[B, T]`` integers, or None for 0, 1, ... from a row's first token on. A token's position grows
            by the length of its row's prompt.
        left: put the padding in front. It is 0 everywhere, and ``ignore_index`` in the labels.
        ignore_index: the label of prompts and padding.
    """
    rows = []
    count = x.shape[1]
    for b, p in enumerate(prompt_ids):
        mask = x.new_ones(count, dtype=torch.int64) if attention_mask is None else attention_mask[b]
        on = mask.nonzero()[:, 0].tolist()
        first, stop = (on[0], on[-1] + 1) if on else (0, 0)
        length = 0 if p < 0 else lengths[p]
        start = sum(lengths[: max(p, 0)])
        steps = torch.arange(length + stop - first, device=x.device)
        numbers = steps[length:] if position_ids is None else position_ids[b, first:stop] + length
        wanted = steps.new_full((length,), ignore_index)
        found = (
            torch.cat([prompts[start : start + length].to(x.dtype), x[b, first:stop]]),
            torch.cat([mask.new_ones(length), mask[first:stop]]),
            torch.cat([steps[:length], numbers]),
            wanted if labels is None else torch.cat([wanted, labels[b, first:stop]]),
        )
        rows.append([_pad(t, width, left, fill) for t, fill in zip(found, (0, 0, 0, ignore_index), strict=True)])
    if not rows:
        kind = torch.int64 if attention_mask is None else attention_mask.dtype
        none, numbers = x.new_empty(0, width, dtype=kind), x.new_empty(0, width, dtype=torch.int64)
        return x.new_empty(0, width, x.shape[2]), none, numbers, numbers.clone()
    y, found_mask, positions, found_labels = (torch.stack(column) for column in zip(*rows, strict=True))
    return y, found_mask, positions, found_labels


def _pad(row: Tensor, width: int, left: bool, fill: int) -> Tensor:
    padding = row.new_full((width - row.shape[0], *row.shape[1:]), fill)
    return torch.cat([padding, row] if left else [row, padding])


def forward(
    prompts: Tensor,
    lengths: Sequence[int],
    prompt_ids: Tensor,
    source: Tensor,
    ids: Tensor | None,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    position_ids: Tensor | None,
    width: int,
    left: bool,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """The outputs of ``prompt_gather``, and ``rows [B, 4]``: each row's prompt, offset, first token, number of tokens.

    ``source`` is x, or with ``ids [B, T]`` the embedding ``[V, D]`` that is read at them; each output is written once.
    """
    b, t = source.shape[:2] if ids is None else ids.shape
    first, count = _spans(attention_mask, b, t, source.device)
    used = torch.where((prompt_ids >= 0) & (prompt_ids < len(lengths)), prompt_ids.long(), -1)
    size = torch.tensor([*lengths, 0], device=used.device)[used]
    start = torch.tensor([*accumulate(lengths, initial=0)], device=used.device)[used.clamp(min=0)]
    offset = width - size - count if left else torch.zeros_like(count)
    place = torch.arange(width, device=source.device) - offset[:, None]  # [B, W], counted from the prompt's first
    token = place - size[:, None]
    inside = (token >= 0) & (token < count[:, None])
    prompted = (place >= 0) & (token < 0)
    at = (token + first[:, None]).clamp(0, max(t - 1, 0))
    y = _look_up(source, ids, at)
    y[(~(inside | prompted)).nonzero(as_tuple=True)] = 0
    _put(y, prompts, torch.stack([offset, size, start], 1).tolist())
    mask = torch.where(prompted | inside, 1, 0)
    if attention_mask is not None:
        read = attention_mask.gather(1, at) if t else mask
        mask = torch.where(inside, read, prompted).to(attention_mask.dtype)
    numbers = token if position_ids is None else position_ids.gather(1, at) if t else token
    positions = torch.where(inside, numbers + size[:, None], torch.where(prompted, place, 0))
    if labels is not None:
        labels = (
            torch.where(inside, labels.gather(1, at), ignore_index) if t else mask.new_full(mask.shape, ignore_index)
        )
        labels = labels.long()
    return y, mask, positions.long(), labels, torch.stack([used, offset, first, count], 1)


def backward(
    dy: Tensor,
    rows: Tensor,
    lengths: Sequence[int],
    dtype: torch.dtype,
    tokens: int,
    need_prompts: bool,
    need_source: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """dprompts ``[S, D]`` in ``dtype`` and dx ``[B, tokens, D]``; None where it is not needed."""
    dprompts = prompt_backward(dy, rows, lengths, dtype) if need_prompts else None
    return dprompts, source_backward(dy, rows, lengths, tokens) if need_source else None


def prompt_backward(dy: Tensor, rows: Tensor, lengths: Sequence[int], dtype: torch.dtype) -> Tensor:
    """``dprompts [S, D]``: of every prompt, the sum over its rows in their order."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    grad = dy.new_zeros(sum(lengths), dy.shape[2], dtype=wide)
    starts = [*accumulate(lengths, initial=0)]
    members: dict[tuple[int, int], list[int]] = {}
    for b, (p, offset, *_) in enumerate(rows.tolist()):
        if p >= 0 and lengths[p]:
            members.setdefault((p, offset), []).append(b)
    for (p, offset), mine in members.items():
        part = dy[:, offset : offset + lengths[p]]
        part = part if len(mine) == dy.shape[0] else part[mine]
        grad[starts[p] : starts[p + 1]] += part.sum(0, dtype=wide)
    return grad.to(dtype)


def source_backward(dy: Tensor, rows: Tensor, lengths: Sequence[int], tokens: int) -> Tensor:
    """``dx [B, T, D]``: 0 where x was padding."""
    dx = dy.new_zeros(dy.shape[0], tokens, dy.shape[2])
    for b, (p, offset, first, count) in enumerate(rows.tolist()):
        begin = offset + (lengths[p] if p >= 0 else 0)
        dx[b, first : first + count] = dy[b, begin : begin + count]
    return dx


def _spans(mask: Tensor | None, b: int, t: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Each row's first token, and how many tokens lie from there to its last."""
    if mask is None or t == 0:
        return torch.zeros(b, dtype=torch.int64, device=device), torch.full((b,), t, device=device)
    on, place = mask != 0, torch.arange(t, device=device)
    first = torch.where(on, place, t).amin(1)
    stop = torch.where(on, place + 1, 0).amax(1)
    return torch.minimum(first, stop), (stop - first).clamp(min=0)


def _look_up(source: Tensor, ids: Tensor | None, at: Tensor) -> Tensor:
    """The tokens' embeddings at ``at [B, W]``, in one call for all rows; what is no token is overwritten later."""
    (b, width), d = at.shape, source.shape[-1]
    if 0 in (b, width, d, (source if ids is None else ids).shape[1]):
        return source.new_empty(b, width, d)
    if ids is None:
        rows, at = source.reshape(-1, d), at + torch.arange(b, device=at.device)[:, None] * source.shape[1]
    else:
        rows, at = source, ids.long().gather(1, at)
    return rows.index_select(0, at.flatten()).view(b, width, d)


def _put(y: Tensor, prompts: Tensor, spans: list[list[int]]) -> None:
    """Write the prompts: rows that have the same one at the same place together."""
    members: dict[tuple[int, ...], list[int]] = {}
    for b, span in enumerate(spans):
        members.setdefault(tuple(span), []).append(b)
    for (offset, size, start), rows in members.items():
        if size:
            which = slice(None) if len(rows) == len(spans) else torch.tensor(rows, device=y.device)
            y[which, offset : offset + size] = prompts[start : start + size].to(y.dtype)
