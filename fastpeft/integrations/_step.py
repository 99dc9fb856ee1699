"""What the serving engines share: one step's routing at fixed addresses, and multi-slot LoRA on their tensors.

An engine captures CUDA graphs for some batch sizes, and replays one with any mapping of tokens to adapters and any
number of tokens up to its size. So a step's routing is written into buffers that never move, and a call on T rows takes
the part of them that belongs to T. Rows past the step's tokens have no adapter: they sort last and fill no tile, so one
sort a step serves every T.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..ops import multi_lora_, route
from ..ops.multi_lora_arguments import MAX_SLICES
from ..ops.routing import DECODE_TOKENS, TILES, Routing, tile_count

_LIBRARY = torch.library.Library("fastpeft", "FRAGMENT")


class StepRouting:
    """Buffers for the routing of one step after another.

    Attributes:
        tables: what ``add_lora_`` reads, to be handed to an op as a list: order ``int32 [max_tokens]``, starts ``int32
            [slots + 1]``, the tiles of few and of many tokens ``int32 [2, n]``, and on the CPU ``int64 [1]``, how many
            tokens the step has, or 0 if none of them has an adapter.
    """

    def __init__(self, max_tokens: int, slots: int, device: torch.device | str):
        self.slots = slots
        self._identity = torch.arange(max_tokens, dtype=torch.int32, device=device)
        starts = torch.zeros(slots + 1, dtype=torch.int32, device=device)
        rooms = [tile_count(min(max_tokens, DECODE_TOKENS), slots, TILES[0]), tile_count(max_tokens, slots, TILES[1])]
        tiles = [torch.full((2, room), -1, dtype=torch.int32, device=device) for room in rooms]
        self.tables = [self._identity.clone(), starts, *tiles, torch.zeros(1, dtype=torch.int64, device="cpu")]

    def update(self, token_slots: Tensor, launch: bool = True) -> None:
        """Route a step's tokens, one int32 or int64 slot each, -1 for none. Does not wait for the device.

        Args:
            launch: False if it is known that no token has an adapter; calls then launch nothing.
        """
        order, starts, few, many, count = self.tables
        tokens = token_slots.numel()
        if tokens > order.shape[0]:
            raise ValueError(f"StepRouting: token_slots has {tokens} tokens, expected at most {order.shape[0]}")
        count.fill_(tokens if launch else 0)
        for tile, table in zip(TILES, (few, many), strict=True):
            used = 0
            if tile != TILES[0] or tokens <= DECODE_TOKENS:
                routing = route(token_slots, self.slots, tile)
                used = routing.tiles.shape[1]
                table[:, :used].copy_(routing.tiles)
            table[:, used:].fill_(-1)
        order[:tokens].copy_(routing.order)
        order[tokens:].copy_(self._identity[tokens:])
        starts.copy_(routing.starts)


def routing_of(tables: Sequence[Tensor], tokens: int) -> Routing:
    """The routing of a call on ``tokens`` rows, as views of the step's buffers: what ``route`` would return."""
    order, starts, few, many, _ = tables
    slots = starts.shape[0] - 1
    tile, tiles = (TILES[0], few) if tokens <= DECODE_TOKENS else (TILES[1], many)
    return Routing(order[:tokens], starts, tiles[:, : tile_count(tokens, slots, tile)], slots, tile)


def add_lora_(
    op: str,
    y: Tensor,
    x: Tensor,
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    tables: Sequence[Tensor],
    scales: Tensor,
    ranks: Tensor | None,
) -> None:
    """``ops.multi_lora_`` on the columns of y that belong to each slice, side by side from column 0 on.

    Args:
        y: ``[T, N]``, N at least the sum of the slices' widths; x: ``[T, K]``, T at least the step's tokens.
        lora_as: ``[slots, R, K]``; lora_bs: ``[slots, N_p, R]``, any number of slices.
        tables: of ``StepRouting``; scales: float32 ``[slots]``; ranks: int32 ``[slots]`` or ``[P, slots]``, or None.
    """
    count, rows = tables[-1].item(), x.shape[0]
    if count == 0:
        return
    if rows < count:
        raise ValueError(f"{op}: x has {rows} rows, expected the step's {count} tokens, or more for padding")
    rows = min(rows, tables[0].shape[0])  # past the buffers there is only padding
    x, y, routing = x[:rows], y[:rows], routing_of(tables, rows)
    ys = y.split([b.shape[1] for b in lora_bs] + [y.shape[1] - sum(b.shape[1] for b in lora_bs)], 1)
    for first in range(0, len(lora_as), MAX_SLICES):
        part = slice(first, min(first + MAX_SLICES, len(lora_as)))
        own = ranks if ranks is None or ranks.dim() == 1 else ranks[part]
        multi_lora_(ys[part], x, lora_as[part], lora_bs[part], routing, scales, own)


def define(name: str, schema: str, implementation: Callable) -> Callable:
    """Register ``fastpeft::name``, which writes into its first argument and returns nothing, and return it.

    An engine's compiler sees one opaque call: what its implementation asks of the number of tokens, or looks up, is
    asked when it runs, not when it is traced.
    """
    _LIBRARY.define(name + schema)
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastpeft::{name}", lambda *_: None, lib=_LIBRARY)
    return getattr(torch.ops.fastpeft, name).default
