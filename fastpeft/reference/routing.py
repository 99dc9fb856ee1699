"""Which tokens of a batch belong to which adapter: the definition, in plain PyTorch.

``token_slots[t]`` is the slot of token t's adapter, or -1 for none. Tokens are sorted by slot, stably, those without an
adapter last; every slot's tokens then lie side by side, and are cut into tiles of equal size, the last one shorter.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Routing(NamedTuple):
    """The tokens of a batch by adapter; made once a step by ``fastpeft.ops.route``, read by every layer.

    Attributes:
        order: ``int32 [T]``, the tokens sorted by slot.
        starts: ``int32 [slots + 1]``: the tokens of slot s are ``order[starts[s] : starts[s + 1]]``.
        tiles: ``int32 [2, n]``: a tile's slot, or -1 for an unused tile, and its first position in ``order``. n depends
            on T and ``slots`` alone, so that a CUDA graph serves every mapping.
        slots: how many slots there are.
        tile: how many tokens a tile has, and with it which kernels run.
    """

    order: Tensor
    starts: Tensor
    tiles: Tensor
    slots: int
    tile: int


def tile_count(tokens: int, slots: int, tile: int) -> int:
    """The most tiles that ``tokens`` tokens can make: each slot in use may end in a short one."""
    used = min(tokens, slots)
    return used + (tokens - used) // tile


def route(token_slots: Tensor, slots: int, tile: int) -> Routing:
    """``Routing`` of ``token_slots [T]``; a slot outside 0 ... slots - 1 is none."""
    count = tile_count(len(token_slots), slots, tile)
    return Routing(*forward(token_slots, slots, tile, count), slots, tile)


def forward(token_slots: Tensor, slots: int, tile: int, tiles: int) -> tuple[Tensor, Tensor, Tensor]:
    """``order [T]``, ``starts [slots + 1]`` and ``tiles [2, tiles]`` of ``Routing``, int32."""
    key = torch.where((token_slots >= 0) & (token_slots < slots), token_slots, slots)
    order = torch.argsort(key, stable=True)
    starts = torch.searchsorted(key[order], torch.arange(slots + 1, device=key.device, dtype=key.dtype))
    counts = (starts.diff() + tile - 1) // tile
    ends = counts.cumsum(0)
    index = torch.arange(tiles, device=key.device)
    slot = torch.searchsorted(ends, index, right=True)
    used, slot = slot < slots, slot.clamp(max=slots - 1)
    first = starts[slot] + (index - (ends - counts)[slot]) * tile
    return order.int(), starts.int(), torch.where(used, torch.stack([slot, first]), -1).int()
