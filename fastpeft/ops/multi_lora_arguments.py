"""What multi_lora accepts: each check names the op, the argument, what it is and what was expected."""

import torch
from torch import Tensor

from .. import _check
from ..reference import Routing
from ..reference.dropout import threshold
from .routing import route

MAX_SLICES = 4


def slices(op, plural, x, lora_as, lora_bs, ys, sizes):
    """Shapes and dtypes of every slice; ``sizes`` gets the number of slots."""
    if not 1 <= len(lora_as) <= MAX_SLICES:
        raise ValueError(f"{op}: lora_a{plural} has {len(lora_as)} items, expected 1 ... {MAX_SLICES}")
    for name, values in (("lora_b", lora_bs), ("y", ys)):
        if len(values) != len(lora_as):
            raise ValueError(f"{op}: {name}{plural} has {len(values)} items, expected {len(lora_as)}")
    first = lora_as[0]
    for a, b, y in zip(lora_as, lora_bs, ys, strict=True):
        of_slice = {name: size for name, size in sizes.items() if name in ("T", "K", "slots")}
        _check.tensor(op, f"lora_a{plural}", a, ("slots", "R", "K"), of_slice, x)
        _check.tensor(op, f"lora_b{plural}", b, ("slots", "N", "R"), of_slice, x)
        _check.dtype(op, f"lora_a{plural}", a, x.dtype, torch.promote_types(x.dtype, torch.float32))
        _check.dtype(op, f"lora_a{plural}", a, first.dtype)
        _check.dtype(op, f"lora_b{plural}", b, first.dtype)
        if a.shape[0] == 0 or a.shape[1] == 0:
            raise ValueError(f"{op}: lora_a{plural} has shape {list(a.shape)}, expected slots>=1 and R>=1")
        if y is not None:
            if not isinstance(y, Tensor) or y.shape[:-1] != x.shape[:-1]:
                given = list(y.shape) if isinstance(y, Tensor) else type(y).__name__
                raise ValueError(f"{op}: y{plural} is {given}, expected {[*x.shape[:-1], b.shape[1]]}")
            _check.tensor(op, f"y{plural}", y.reshape(-1, y.shape[-1]), ("T", "N"), of_slice, x)
            _check.dtype(op, f"y{plural}", y, x.dtype)
        sizes["slots"] = of_slice["slots"]


def inplace(op, x, lora_as, lora_bs, ys):
    """Nobody asks for a gradient, and every y can be written as ``[T, N]``."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *lora_as, *lora_bs, *ys)):
        raise ValueError(f"{op}: an operand requires a gradient, expected none (multi_lora is differentiable)")
    for y in ys:
        if y.dim() > 2 and not y.is_contiguous():
            raise ValueError(
                f"{op}: y has shape {list(y.shape)} and strides {y.stride()}, expected [T, N] or a contiguous tensor"
            )


def routing(op, token_slots, slots, tokens, x, backend) -> Routing:
    """What ``route`` makes of the slots, or has made of them for such a batch."""
    routing = token_slots
    if not isinstance(token_slots, Routing):
        if not isinstance(token_slots, Tensor) or token_slots.numel() != tokens:
            given = list(token_slots.shape) if isinstance(token_slots, Tensor) else type(token_slots).__name__
            raise ValueError(f"{op}: token_slots is {given}, expected one slot for each of {tokens} tokens")
        routing = route(token_slots, slots, backend=backend)
    if routing.slots != slots or routing.order.shape[0] != tokens or routing.order.device != x.device:
        given = f"{routing.order.shape[0]} tokens, {routing.slots} slots on {routing.order.device}"
        raise ValueError(
            f"{op}: token_slots was routed for {given}, expected {tokens} tokens, {slots} slots on {x.device}"
        )
    return routing


def table(op, name, table, dtype, count, slots, x) -> Tensor:
    """``[slots]`` or ``[P, slots]``, adjacent along the slots."""
    if not isinstance(table, Tensor) or table.dtype != dtype or table.device != x.device:
        given = f"{table.dtype} on {table.device}" if isinstance(table, Tensor) else type(table).__name__
        raise TypeError(f"{op}: {name} is {given}, expected {dtype} on {x.device}")
    fits = table.dim() in (1, 2) and table.shape[-1] == slots and (table.dim() == 1 or table.shape[0] == count)
    if not fits:
        shapes = f"[{slots}]" + f" or [{count}, {slots}]" * (count > 1)
        raise ValueError(f"{op}: {name} has shape {list(table.shape)}, expected {shapes}")
    return table if table.stride(-1) == 1 else table.contiguous()


def dropout(op, dropouts, seeds, count, slots, x) -> tuple[Tensor | None, Tensor | None]:
    """Thresholds and seeds on the device, or (None, None) where nobody drops anything."""
    if dropouts is None:
        return None, None
    if len(dropouts) != slots:
        raise ValueError(f"{op}: dropouts has {len(dropouts)} items, expected {slots}, one for each slot")
    thresholds = [threshold(_check.probability(op, "dropouts", dropout)) for dropout in dropouts]
    if not any(thresholds):
        return None, None
    shape = (slots,) if count == 1 else (count, slots)
    if seeds is None:
        seeds = torch.randint(1 << 62, shape, dtype=torch.int64, device=x.device)
    if not isinstance(seeds, Tensor) or seeds.dtype != torch.int64 or seeds.shape != shape or seeds.device != x.device:
        given = f"{seeds.dtype} {list(seeds.shape)}" if isinstance(seeds, Tensor) else type(seeds).__name__
        raise ValueError(f"{op}: seeds is {given}, expected torch.int64 {list(shape)} on {x.device}")
    return torch.tensor(thresholds, dtype=torch.int32, device=x.device), seeds.contiguous()
