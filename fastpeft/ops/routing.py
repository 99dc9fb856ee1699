"""Which tokens of a batch belong to which adapter slot, worked out once a step for all layers.

The tokens are sorted by slot, stably, and every slot's tokens are cut into tiles; see ``fastpeft.reference.Routing``.
On a GPU two small kernels do it, nothing waits for the device, and every shape depends on the number of tokens and of
slots alone: the call can be captured in a CUDA graph and replayed with another mapping in ``token_slots``.
"""

import torch
from torch import Tensor

from .. import _backend, _check
from .._library import register_op
from ..reference.routing import Routing, tile_count
from ..reference.routing import route as by_definition

TILES = (16, 64)
DECODE_TOKENS = 512  # up to here a batch is few tokens of many adapters; past it, many tokens of few


def _implementation(token_slots: Tensor, slots: int, tile: int, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    if token_slots.device.type == "cpu" and len(token_slots):
        lowest, highest = token_slots.min().item(), token_slots.max().item()
        if lowest < -1 or highest >= slots:
            wrong = lowest if lowest < -1 else highest
            raise ValueError(f"route: token_slots holds slot {wrong}, expected -1 (none) ... {slots - 1}")
    if backend == "reference":
        return by_definition(token_slots, slots, tile)[:3]
    return _backend.load("routing", backend).route(token_slots, slots, tile, tile_count(len(token_slots), slots, tile))


def _fake(token_slots: Tensor, slots: int, tile: int, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    t = token_slots.shape[0]
    used = torch.sym_min(t, slots)
    shapes = (t,), (slots + 1,), (2, used + (t - used) // tile)
    return tuple(token_slots.new_empty(shape, dtype=torch.int32) for shape in shapes)


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
        backend: "cuda", "triton", "reference", or None for ``FASTPEFT_BACKEND`` and then the automatic choice.

    Raises:
        TypeError, ValueError: naming the argument, what it is and what was expected.
    """
    if not isinstance(token_slots, Tensor) or token_slots.dtype not in (torch.int32, torch.int64):
        given = token_slots.dtype if isinstance(token_slots, Tensor) else type(token_slots).__name__
        raise TypeError(f"route: token_slots is {given}, expected a tensor of torch.int32 or torch.int64")
    _check.positive("route", "slots", slots)
    if tile is None:
        tile = TILES[0] if token_slots.numel() <= DECODE_TOKENS else TILES[1]
    if tile not in TILES:
        raise ValueError(f"route: tile is {tile!r}, expected one of {', '.join(map(str, TILES))}")
    backend = _backend.choose("route", backend, REASONS, token_slots)
    return Routing(*_route(token_slots.reshape(-1), slots, tile, backend), slots, tile)


def explain(token_slots: Tensor, *_, backend: str | None = None, **__) -> str:
    """Which backend serves ``route`` on this tensor, and why the others do not."""
    return _backend.explain("routing", backend, REASONS, token_slots)


REASONS = {
    # csrc/ reads a routing and makes none: asked for, it is the Triton kernels' all the same.
    "cuda": lambda token_slots: _backend.cuda_missing() or _backend.triton_reason(token_slots.device),
    _backend.UNASKED: lambda token_slots: "csrc/ has no kernel for it, the Triton kernels serve",
    "triton": lambda token_slots: _backend.triton_reason(token_slots.device),
    "reference": lambda token_slots: None,
}
