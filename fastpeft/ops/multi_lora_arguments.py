"""What multi_lora accepts: each check names the op, the argument, what it is and what was expected."""

import torch
from torch import Tensor

from .. import _check
from .._device import constant
from .._mask import threshold

MAX_SLICES = 4


ONE = ("lora_a", "lora_b", "y")
SHARED = ("lora_as", "lora_bs", "ys")
LISTS = ("lora_a", "lora_b", "y", "lists")  # in place, where the same arguments may be lists


def slices(op, names, x, lora_as, lora_bs, ys, sizes):
    """Shapes and dtypes of every slice; ``sizes`` gets the number of slots."""
    if names is not ONE:
        for name, values in zip(names, (lora_as, lora_bs, ys), strict=False):
            _check.items(op, name, values)
        if not 1 <= len(lora_as) <= MAX_SLICES:
            raise ValueError(f"{op}: {names[0]} has {len(lora_as)} items, expected 1 ... {MAX_SLICES}")
        for name, values in zip(names[1:], (lora_bs, ys), strict=False):
            _check.items(op, name, values, len(lora_as))
    first = None
    for p, (a, b, y) in enumerate(zip(lora_as, lora_bs, ys, strict=True)):
        a_name, b_name, y_name = names if names is ONE else ((name, p) for name in names[:3])
        of_slice = {name: size for name, size in sizes.items() if name in ("T", "K", "slots")}
        _check.tensor(op, a_name, a, ("slots", "R", "K"), of_slice, x)
        _check.tensor(op, b_name, b, ("slots", "N", "R"), of_slice, x)
        _check.dtype(op, a_name, a, x.dtype, torch.promote_types(x.dtype, torch.float32))
        first = first or a.dtype
        _check.dtype(op, a_name, a, first)
        _check.dtype(op, b_name, b, first)
        if a.shape[0] == 0 or a.shape[1] == 0:
            raise ValueError(f"{op}: {_check.label(a_name)} has shape {list(a.shape)}, expected slots>=1 and R>=1")
        if y is not None:
            if not isinstance(y, Tensor) or y.shape[:-1] != x.shape[:-1]:
                given = list(y.shape) if isinstance(y, Tensor) else _check.shown(y)
                raise ValueError(f"{op}: {_check.label(y_name)} is {given}, expected {[*x.shape[:-1], b.shape[1]]}")
            _check.tensor(op, y_name, y.reshape(-1, y.shape[-1]), ("T", "N"), of_slice, x)
            _check.dtype(op, y_name, y, x.dtype)
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


def table(op, name, table, dtype, count, slots, x) -> Tensor:
    """``[slots]`` or ``[P, slots]``, adjacent along the slots."""
    if not isinstance(table, Tensor) or table.dtype != dtype or table.device != x.device:
        given = f"{table.dtype} on {table.device}" if isinstance(table, Tensor) else _check.shown(table)
        raise TypeError(f"{op}: {name} is {given}, expected {dtype} on {x.device}")
    fits = table.dim() in (1, 2) and table.shape[-1] == slots and (table.dim() == 1 or table.shape[0] == count)
    if not fits:
        shapes = f"[{slots}]" + f" or [{count}, {slots}]" * (count > 1)
        raise ValueError(f"{op}: {name} has shape {list(table.shape)}, expected {shapes}")
    return table if table.stride(-1) == 1 else table.contiguous()


def dropout(op, dropouts, seeds, count, slots, x) -> tuple[Tensor, Tensor]:
    """Thresholds and seeds on the device; empty where nobody drops anything."""
    absent = x.new_empty(0)
    if dropouts is None:
        return absent, absent
    if len(_check.items(op, "dropouts", dropouts)) != slots:
        raise ValueError(f"{op}: dropouts has {len(dropouts)} items, expected {slots}, one for each slot")
    thresholds = [threshold(_check.probability(op, ("dropouts", s), p)) for s, p in enumerate(dropouts)]
    if not any(thresholds):
        return absent, absent
    shape = (slots,) if count == 1 else (count, slots)
    if seeds is None:
        seeds = torch.randint(1 << 62, shape, dtype=torch.int64, device=x.device)
    if not isinstance(seeds, Tensor) or seeds.dtype != torch.int64 or seeds.shape != shape or seeds.device != x.device:
        given = f"{seeds.dtype} {list(seeds.shape)}" if isinstance(seeds, Tensor) else _check.shown(seeds)
        raise ValueError(f"{op}: seeds is {given}, expected torch.int64 {list(shape)} on {x.device}")
    return constant(tuple(thresholds), torch.int32, x.device), seeds.contiguous()
