"""What others do for prompts and prefixes: the forms a person writes in plain PyTorch, and PEFT's.

Each takes the arguments that bench_prompt draws and gives the op's output. Where ours also gives a mask, positions and
labels, so do they, and nobody reads them.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpeft.testing import PromptProblem, eager_prompt_gather


def embedding(a) -> Tensor:
    return F.embedding(a.gather.ids, a.gather.table)


def _integers(g: PromptProblem, sizes: Tensor, width: int) -> tuple[Tensor, ...]:
    """Mask, positions and labels of right-padded rows, by arithmetic on all of them."""
    place = torch.arange(width, device=sizes.device)
    token = place - sizes[:, None]
    inside = (token >= 0) & (token < g.ids.shape[1])
    on = place < sizes[:, None] + g.ids.shape[1]
    labels = torch.where(inside, g.labels.gather(1, token.clamp(0, g.ids.shape[1] - 1)), -100)
    return on.long(), torch.where(on, place, 0), labels, inside, token


def _sizes(g: PromptProblem) -> list[int]:
    return [len(g.prompts[p]) if p >= 0 else 0 for p in g.prompt_ids]


def eager(a) -> Tensor:
    g = a.gather
    y = eager_prompt_gather(g.prompts, g.prompt_ids, embedding(a))
    _integers(g, torch.tensor(_sizes(g), device=y.device), y.shape[1])
    return y


def indexed(g: PromptProblem, which: Tensor, sizes: Tensor, starts: Tensor, width: int) -> tuple[Tensor, ...]:
    """All that may be in front of each other in one table, and every place an index into it."""
    x = F.embedding(g.ids, g.table)
    table = torch.cat([*(p.to(x.dtype) for p in g.prompts), x.flatten(0, 1), x.new_zeros(1, x.shape[2])])
    on, positions, labels, inside, token = _integers(g, sizes, width)
    first = sum(len(p) for p in g.prompts)
    rows = torch.arange(len(which), device=which.device)[:, None] * x.shape[1]
    place = torch.arange(width, device=which.device)
    at = torch.where(place < sizes[:, None], starts[:, None] + place, first + rows + token)
    at = torch.where((place < sizes[:, None]) | inside, at, len(table) - 1)
    return table[at], on, positions, labels


def index(a, function: Callable = indexed) -> Tensor:
    g = a.gather
    sizes = _sizes(g)
    ends = torch.tensor([len(p) for p in g.prompts]).cumsum(0).tolist()
    starts = [ends[p] - len(g.prompts[p]) if p >= 0 else 0 for p in g.prompt_ids]
    which, sizes_, starts = (torch.tensor(t, device=g.ids.device) for t in (g.prompt_ids, sizes, starts))
    return function(g, which, sizes_, starts, g.ids.shape[1] + max(sizes))[0]


def peft_prompt(a) -> Tensor:
    """What PEFT's forward does where all rows have one prompt."""
    g = a.gather
    rows, length = g.ids.shape[0], len(g.prompts[0])
    tokens = torch.arange(length).unsqueeze(0).expand(rows, -1).to(g.ids.device)
    mask = torch.ones_like(g.ids)
    torch.cat((torch.ones(rows, length).to(mask.device), mask), dim=1)
    x = F.embedding(g.ids, g.table)
    torch.cat((torch.full((rows, length), -100).to(g.labels.device), g.labels), dim=1)
    return torch.cat((F.embedding(tokens, g.prompts[0]).to(x.dtype), x), dim=1)


def peft_prefix(a) -> Tensor:
    """PEFT's way: a copy of the prefix for every row, in front of its keys and values, and a mask."""
    q, k, v, pk, pv = a.inputs
    t, length = q.shape[2], pk.shape[1]
    k, v = (torch.cat([p.repeat(len(q), 1, 1, 1), own], 2) for p, own in ((pk, k), (pv, v)))
    sees = torch.ones(t, length + t, dtype=torch.bool, device=q.device).tril(length)
    return F.scaled_dot_product_attention(q, k, v, sees)
