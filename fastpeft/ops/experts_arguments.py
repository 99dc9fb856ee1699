"""What experts accepts: each check names the op, the argument, what it is and what was expected."""

import torch
from torch import Tensor

from .. import _backend, _check
from ..reference.experts import ExpertLinear, ExpertRouting
from ..reference.routing import Routing
from .routing import ONE_OF_TILES, TILES, route, tile_of

MAX_RANK = 512


def tokens(x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> None:
    """Shapes and dtypes of what the router hands over."""
    if not isinstance(x, Tensor) or x.dim() != 2 or not x.is_floating_point():
        raise TypeError(f"experts: x is {_check.shown(x)}, expected a floating-point tensor [T, H]")
    if not isinstance(top_k_index, Tensor) or top_k_index.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"experts: top_k_index is {_check.shown(top_k_index)}, expected torch.int32 or torch.int64 [T, k]"
        )
    if top_k_index.dim() != 2 or len(top_k_index) != len(x):
        raise ValueError(f"experts: top_k_index has shape {list(top_k_index.shape)}, expected [{len(x)}, k]")
    sizes = {"T": len(x), "k": top_k_index.shape[1]}
    _check.tensor("experts", "top_k_weights", top_k_weights, ("T", "k"), sizes, x)


def numbers(name: str, linear: ExpertLinear) -> ExpertLinear:
    """A projection with its numbers as floats."""
    if not isinstance(linear, ExpertLinear):
        raise TypeError(f"experts: {name} is {_check.shown(linear)}, expected an ExpertLinear")
    scale = _check.finite("experts", f"{name}.scale", linear.scale)
    return linear._replace(scale=scale, dropout=_check.probability("experts", f"{name}.dropout", linear.dropout))


def projection(
    name: str, linear: ExpertLinear, x: Tensor, sizes: dict[str, int], dtype: torch.dtype | None = None
) -> None:
    """Shapes and dtypes of one projection, whose ``sizes`` and weight's dtype may be known."""
    weight, bias, lora_a, lora_b, _, _ = linear
    op, of = "experts", lambda part: f"{name}.{part}"
    _check.tensor(op, of("weight"), weight, ("E", "N", "K"), sizes, x)
    _check.dtype(op, of("weight"), weight, dtype or weight.dtype)
    if weight.shape[0] == 0:
        raise ValueError(f"{op}: {of('weight')} has shape {list(weight.shape)}, expected at least one expert")
    if bias is not None:
        _check.tensor(op, of("bias"), bias, ("E", "N"), sizes, x)
        _check.dtype(op, of("bias"), bias, weight.dtype)
    if (lora_a is None) != (lora_b is None):
        raise ValueError(f"{op}: {of('lora_a')} and {of('lora_b')}: one is None, expected both or neither")
    if lora_a is not None and lora_b is not None:
        _check.tensor(op, of("lora_a"), lora_a, ("E", "R", "K"), sizes, x)
        _check.tensor(op, of("lora_b"), lora_b, ("E", "N", "R"), sizes, x)
        _check.dtype(op, of("lora_a"), lora_a, weight.dtype, torch.promote_types(weight.dtype, torch.float32))
        _check.dtype(op, of("lora_b"), lora_b, lora_a.dtype)
        if lora_a.shape[1] == 0:
            raise ValueError(f"{op}: {of('lora_a')} has R=0, expected R>=1")


def seeds(given: Tensor | None, experts: int, drops: bool, x: Tensor) -> Tensor | None:
    """int64 ``[2, E]``; drawn from torch's generator, which checkpointing restores; None where nobody drops."""
    if not drops:
        return None
    if given is None:
        return torch.randint(1 << 62, (2, experts), dtype=torch.int64, device=x.device)
    fits = isinstance(given, Tensor) and given.dtype == torch.int64 and given.device == x.device
    if not fits or given.shape != (2, experts):
        raise ValueError(f"experts: seeds is {_check.shown(given)}, expected torch.int64 [2, {experts}] on {x.device}")
    return given


def default_tile(dtype: torch.dtype, dropout: float) -> int | None:
    """Rows of a tile where nobody says: by their number, as ``route`` has it; 64 of float32 and a mask spill."""
    return TILES[0] if dropout and dtype.itemsize > 2 else None


def tile(given: int | None, up: ExpertLinear, down: ExpertLinear, top_k_index: Tensor) -> int:
    """Rows of a tile: as given, or by the number of rows."""
    if given is not None:
        return _check.integer("experts", "tile", given, ONE_OF_TILES)
    return default_tile(up.weight.dtype, max(up.dropout, down.dropout)) or tile_of(top_k_index.numel())


def routing(top_k_index: Tensor, experts: int, tile: int | None, backend: str | None) -> ExpertRouting:
    """``ExpertRouting`` of the router's choices, made on their device."""
    index = top_k_index.reshape(-1)
    index = torch.where((index >= 0) & (index < experts), index, -1)
    order, starts, tiles, slots, tile = route(index, experts, tile, backend)
    rows = torch.arange(len(index), dtype=torch.int32, device=index.device)
    places = torch.empty_like(rows).index_copy_(0, order.long(), rows).view(top_k_index.shape)
    tokens = order // top_k_index.shape[1] if len(order) else order
    return ExpertRouting(tokens, places, Routing(rows, starts, tiles, slots, tile))


def backend(requested: str | None, x: Tensor, up: ExpertLinear, down: ExpertLinear) -> str:
    """The backend that serves both projections."""
    return _backend.choose("experts", requested, REASONS, x, up, down)


def _triton_reason(x: Tensor, up: ExpertLinear, down: ExpertLinear) -> str | None:
    adapters = [linear.lora_a for linear in (up, down) if linear.lora_a is not None]
    x = x.detach().new_empty(0, dtype=up.weight.dtype)  # the products are in the weights' dtype
    for a in adapters or [x.new_empty(0, 1, 0)]:
        reason = _backend.triton_lora_reason(x, a.dtype, a.shape[1], MAX_RANK)
        if reason is not None:
            return reason
    return None


REASONS = {
    # csrc/ has no kernel for it: asked for, the low-rank products are the Triton kernels' all the same.
    "cuda": lambda x, up, down: "csrc/ has no kernel for it",
    "triton": _triton_reason,
    "reference": lambda *_: None,
}


def facts(given: dict) -> tuple:
    """What ``REASONS`` look at, of the arguments of ``experts`` by name."""
    return given["x"], given["up"], given["down"]
