"""Which tokens of a batch belong to which adapter slot, worked out once a step for all layers.

The tokens are sorted by slot, stably, and every slot's tokens are cut into tiles; see ``fastpeft.reference.Routing``.
On a GPU two small kernels do it, nothing waits for the device, and every shape depends on the number of tokens and of
slots alone: the call can be captured in a CUDA graph and replayed with another mapping in ``token_slots``.
"""

from itertools import pairwise

import torch
from torch import Tensor

from .. import _backend, _check
from .._library import register_op
from ..reference.routing import Routing, tile_count

TILES = (16, 64)
ONE_OF_TILES = f"one of {', '.join(map(str, TILES))}"
DECODE_TOKENS = 512  # up to here a batch is few tokens of many adapters; past it, many tokens of few


def _implementation(token_slots: Tensor, slots: int, tile: int, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    if token_slots.device.type == "cpu" and len(token_slots):
        lowest, highest = token_slots.min().item(), token_slots.max().item()
        if lowest < -1 or highest >= slots:
            wrong = lowest if lowest < -1 else highest
            raise ValueError(f"route: token_slots holds slot {wrong}, expected -1 (none) ... {slots - 1}")
    return _backend.load("routing", backend).forward(
        token_slots, slots, tile, tile_count(len(token_slots), slots, tile)
    )


def _fake(token_slots: Tensor, slots: int, tile: int, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    t = token_slots.shape[0]
    used = torch.sym_min(t, slots)
    shapes = (t,), (slots + 1,), (2, used + (t - used) // tile)
    order, starts, tiles = (token_slots.new_empty(shape, dtype=torch.int32) for shape in shapes)
    return order, starts, tiles


_route = register_op(
    "route",
    "(Tensor token_slots, int slots, int tile, str backend) -> (Tensor, Tensor, Tensor)",
    _implementation,
    _fake,
)


def route(token_slots: Tensor, slots: int, tile: int | None = None, backend: str | None = None) -> Routing:
    """Sort the tokens of a batch by adapter slot, for ``multi_lora`` in every layer of a step.

    Args:
        token_slots: int32 or int64, any shape: each token's slot, or -1 for none. A slot that does not exist is an
            error on the CPU; on a GPU, where looking would wait for the device, it is none.
        slots: the number of slots.
        tile: tokens a tile has, 16 or 64; None: 16 up to 512 tokens, else 64. It picks the kernels, so a caller who
            states it gets a token's result with the same bits in batches of every size.
        backend: "cuda", "triton" or "reference", which then serves the call, or raises with the reason why it cannot.
            None takes the environment's ``FASTPEFT_BACKEND``, and without one the first of the three that can serve.

    Returns:
        The tokens in the order of their slots, and the tiles they are cut into, on the device of ``token_slots``.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value, or the backend asked for cannot serve the call.
            Every message names the op, the argument, what it is and what was expected.
    """
    if not isinstance(token_slots, Tensor) or token_slots.dtype not in (torch.int32, torch.int64):
        given = token_slots.dtype if isinstance(token_slots, Tensor) else _check.shown(token_slots)
        raise TypeError(f"route: token_slots is {given}, expected a tensor of torch.int32 or torch.int64")
    slots = _check.positive("route", "slots", slots)
    if tile is None:
        tile = tile_of(token_slots.numel())
    else:
        tile = _check.integer("route", "tile", tile, ONE_OF_TILES)
    if tile not in TILES:
        raise ValueError(f"route: tile is {tile}, expected {ONE_OF_TILES}")
    backend = _backend.choose("route", backend, REASONS, token_slots)
    order, starts, tiles = _route(token_slots.reshape(-1), slots, tile, backend)
    return Routing(order, starts, tiles, slots, tile)


def tile_of(tokens: int) -> int:
    """Tokens of a tile where nobody says."""
    return TILES[0] if tokens <= DECODE_TOKENS else TILES[1]


def check_slots(op: str, name: str, given: Tensor | Routing, rows: int) -> None:
    """A slot for each row, or a routing."""
    if not isinstance(given, Routing) and (not isinstance(given, Tensor) or given.numel() != rows):
        what = list(given.shape) if isinstance(given, Tensor) else _check.shown(given)
        raise ValueError(f"{op}: {name} is {what}, expected one slot for each of {rows} rows")


def routed(op: str, name: str, given: Tensor | Routing, slots: int, rows: int, x: Tensor, backend: str) -> Routing:
    """What ``route`` makes of an op's argument, or has made of it for such a batch: ``rows`` rows, ``slots`` slots."""
    check_slots(op, name, given, rows)
    found = given if isinstance(given, Routing) else route(given, slots, backend=backend)
    if found.slots != slots or found.order.shape[0] != rows or found.order.device != x.device:
        what = f"{found.order.shape[0]} rows, {found.slots} slots on {found.order.device}"
        raise ValueError(f"{op}: {name} was routed for {what}, expected {rows} rows, {slots} slots on {x.device}")
    return found


def facts(given: dict) -> tuple:
    """What ``REASONS`` look at, of the arguments of ``route`` by name."""
    return (given["token_slots"],)


REASONS = {
    # csrc/ reads a routing and makes none: asked for, it is the Triton kernels' all the same.
    "cuda": lambda token_slots: _backend.cuda_missing() or _backend.triton_reason(token_slots.device),
    _backend.UNASKED: lambda token_slots: "csrc/ has no kernel for it, the Triton kernels serve",
    "triton": lambda token_slots: _backend.triton_reason(token_slots.device),
    "reference": lambda token_slots: None,
}


def slots_of(order: Tensor, starts: Tensor) -> Tensor:
    """The tokens' slots that were routed, -1 for none."""
    slots, bounds = torch.full_like(order, -1), starts.tolist()
    for slot, (first, end) in enumerate(pairwise(bounds)):
        slots[order[first:end].long()] = slot
    return slots
