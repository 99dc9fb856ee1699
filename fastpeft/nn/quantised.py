"""Frozen layers with a quantised weight, as ``fastpeft.ops.Base`` has it: bitsandbytes' Linear4bit and Linear8bitLt.

They are known by their names and read by their attributes; nothing is imported. A layer may always be called as it is
instead, and is where that is better or the only way: see ``is_called``.
"""

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from .guarding import guard_item

FEW_ROWS = 32  # up to here bitsandbytes multiplies by the codes themselves, and a weight written out would be read once
_MODULE = "bitsandbytes.nn.modules"
_STATE = ("absmax", "shape", "code", "blocksize", "offset", "state2", "packing_format_for_cpu")


class _Kept(NamedTuple):
    """A Base, and what it was made from, but for the weight, which refers to its module."""

    weight: Any
    parts: tuple
    base: ops.Base


_kept: weakref.WeakKeyDictionary[nn.Module, _Kept] = weakref.WeakKeyDictionary()


def kind_of(module: nn.Module) -> str | None:
    """ "Linear4bit" or "Linear8bitLt" for those layers, and those of their subclasses that have the same forward."""
    for kind in type(module).__mro__:
        if kind.__module__ == _MODULE and kind.__name__ in ("Linear4bit", "Linear8bitLt"):
            return kind.__name__ if type(module).forward is getattr(kind, "forward", None) else None
    return None


def base_of(module: nn.Module) -> ops.Base | str:
    """The layer's weight, the same object as long as nothing in it is replaced; or why it cannot be read.

    Args:
        module: A layer that ``kind_of`` knows.
    """
    weight: Any = module._parameters["weight"]
    if weight is None or weight.is_meta:
        return "its base layer's weight is offloaded or on the meta device"
    found = _four_bit(module, weight) if kind_of(module) == "Linear4bit" else _eight_bit(module, weight)
    if isinstance(found, str):
        return found
    make, parts = found
    if torch.compiler.is_compiling():
        return make(*parts)
    before = _kept.get(module)
    if before is None or before.weight() is not weight or not _same(before.parts, parts):
        # The tensor itself, past the subclass; it refers to the memory alone.
        _kept[module] = before = _Kept(weakref.ref(weight), parts, make(*parts))
    return before.base


def guard(guards: Any, modules: dict, name: str) -> None:
    """Names all that ``base_of`` reads of a child, beside what ``guard_child`` does."""
    module = modules[name]
    weight, states = module._parameters["weight"], [module.__dict__.get("state")]
    for attribute in ("compute_dtype", "quant_state", "state", "training"):
        guard_item(guards, module.__dict__, attribute)
    for attribute in ("quant_state", "CB", "SCB"):
        guard_item(guards, weight.__dict__, attribute)
    states.append(getattr(weight, "quant_state", None) or module.__dict__.get("quant_state"))
    states.append(getattr(states[-1], "state2", None))
    for state in states:
        if state is not None:
            for attribute in (*_STATE, "CB", "SCB", "has_fp16_weights"):
                guard_item(guards, state.__dict__, attribute)


def is_called(base: ops.Base, x: Tensor) -> bool:
    """Whether the frozen layer is to be called as it is for this x: of few rows, or in another dtype than its own."""
    k = base.shape[1]
    return x.numel() <= FEW_ROWS * k or base.dtype not in (None, computed_dtype(x))


def computed_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which an op computes with x: autocast's, or its own."""
    device = x.device.type
    if x.dtype == torch.float64 or device == "meta" or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


def _four_bit(module: nn.Module, weight: Any) -> tuple | str:
    state: Any = getattr(weight, "quant_state", None) or module.__dict__.get("quant_state")
    if state is None:
        return "its base layer's weight is not quantised yet"
    if getattr(state, "packing_format_for_cpu", False):
        return "its base layer's weight was repacked by bitsandbytes, for evaluation on a CPU"
    nested = state.state2 if getattr(state, "nested", False) else None
    if tuple(state.shape) != (module.out_features, module.in_features):
        return f"its base layer's weight was quantised in shape {list(state.shape)}"
    if nested is not None and nested.code.numel() != 256:
        return "its base layer's scales are quantised in another format"
    tables = None if nested is None else (nested.absmax, nested.code, state.offset, nested.blocksize)
    dtype = module.__dict__.get("compute_dtype")
    return ops.four_bit, (_plain(weight), state.absmax, state.code, tuple(state.shape), state.blocksize, dtype, tables)


def _eight_bit(module: nn.Module, weight: Any) -> tuple | str:
    state: Any = module.__dict__["state"]
    codes = state.CB if state.CB is not None else weight.CB
    absmax = state.SCB if state.SCB is not None else weight.SCB
    if state.has_fp16_weights or codes is None or absmax is None:
        return "its base layer's weight is not quantised yet, or at every call"
    if not module.training:
        return "its base layer is evaluated, where bitsandbytes multiplies in 8 bits"
    return ops.eight_bit, (_plain(codes), absmax)


def _plain(tensor: Tensor) -> Tensor:
    return tensor if type(tensor) is Tensor else torch.Tensor._make_subclass(torch.Tensor, tensor)


def _same(one: tuple, other: tuple) -> bool:
    for a, b in zip(one, other, strict=True):
        if isinstance(a, tuple) and isinstance(b, tuple):
            if len(a) != len(b) or not _same(a, b):
                return False
        elif isinstance(a, Tensor) and isinstance(b, Tensor):
            if a is not b and (a.data_ptr() != b.data_ptr() or a.shape != b.shape or a.dtype != b.dtype):
                return False
        elif a != b:
            return False
    return True
