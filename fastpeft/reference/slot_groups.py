"""Which slots of a mixed batch go through one ``bmm``: those of one true rank and about as many tokens."""

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .routing import Routing

CHEAP_PADDING = 64  # rows that a bmm takes in less time than the calls of one more bmm


class Group(NamedTuple):
    """Slots of one true rank, their tokens padded to one number by repeating the last: what ``bmm`` takes.

    ``chosen`` indexes the slots, without a copy where they are neighbours. ``rows`` are places in the order, ``tokens``
    the tokens there, padding included; ``places`` and ``real_tokens`` are the same without it; ``real`` says where
    those are among the padded ones, None: everywhere.
    """

    slots: tuple[int, ...]
    counts: tuple[int, ...]
    rank: int
    chosen: slice | Tensor
    rows: Tensor
    tokens: Tensor
    places: Tensor
    real_tokens: Tensor
    real: Tensor | None

    def without_padding(self, values: Tensor) -> Tensor:
        """``[slots, tokens, ...]`` as ``[real tokens, ...]``."""
        values = values.view(-1, values.shape[-1])
        return values if self.real is None else values.index_select(0, self.real)


def groups_of(routing: Routing, ranks: Tensor | None, largest: int) -> list[Group]:
    """All slots that have tokens and a rank (``ranks [slots]``, None: ``largest``), in as few groups as pay."""
    order, starts = (tuple(t.tolist()) for t in routing[:2])
    return _grouped(order, starts, None if ranks is None else tuple(ranks.tolist()), largest, routing.order.device)


@functools.lru_cache(maxsize=64)  # of values, not of tensors: the layers of a step, and steps of decoding, agree
def _grouped(
    order: tuple[int, ...], starts: tuple[int, ...], ranks: tuple[int, ...] | None, largest: int, device
) -> list[Group]:
    by_rank: dict[int, list[tuple[int, int, int]]] = {}
    for slot, start, stop, rank in used_slots(starts, ranks, largest):
        by_rank.setdefault(rank, []).append((slot, start, stop))
    groups = []
    for rank, segments in by_rank.items():
        segments.sort(key=lambda segment: segment[1] - segment[2])
        while segments:  # together while padding no more than doubles the work, or is less than another group costs
            longest, padding, count = segments[0][2] - segments[0][1], 0, 0
            for _, start, stop in segments:
                padding += longest - (stop - start)
                if 2 * (stop - start) < longest and padding > CHEAP_PADDING:
                    break
                count += 1
            groups.append(_group(sorted(segments[:count]), rank, longest, order, device))
            segments = segments[count:]
    return groups


def _group(segments: list[tuple[int, int, int]], rank: int, longest: int, order: tuple[int, ...], device) -> Group:
    slots, starts, stops = zip(*segments, strict=True)
    places = [min(start + i, stop - 1) for start, stop in zip(starts, stops, strict=True) for i in range(longest)]
    counts = tuple(stop - start for start, stop in zip(starts, stops, strict=True))
    taken = [u * longest + i for u, count in enumerate(counts) for i in range(count)]
    with torch.inference_mode(False):  # what is kept serves training too
        rows, real = (torch.tensor(values, device=device) for values in (places, taken))
        tokens = torch.tensor(order, device=device)[rows]
        adjacent = slots[-1] - slots[0] == len(slots) - 1
        chosen = slice(slots[0], slots[-1] + 1) if adjacent else torch.tensor(slots, device=device)
        padded = real if len(real) < len(rows) else None
        return Group(slots, counts, rank, chosen, rows, tokens, rows[real], tokens[real], padded)


def used_slots(starts: Sequence[int], ranks: Sequence[int] | None, largest: int) -> Iterator[tuple[int, int, int, int]]:
    """(slot, its first place in the order, the place past its last, its true rank) of every slot that has both."""
    for slot, (start, stop) in enumerate(itertools.pairwise(starts)):
        rank = largest if ranks is None else max(0, min(ranks[slot], largest))
        if start < stop and rank:
            yield slot, start, stop, rank
