"""Frozen layers with a quantised weight, as ``fastpeft.ops.Base`` has it: bitsandbytes' Linear4bit and Linear8bitLt.

They are known by their names and read by their attributes; nothing is imported. A layer may always be called as it is
instead, and is where that is better or the only way: see ``is_called``.
"""

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import _check, ops
from . import dequantisers
from .guarding import guard_item, guard_lora

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


def is_read(module: nn.Module) -> bool:
    """Whether the layer's weight is written out: bitsandbytes', or that of a library with a dequantiser."""
    return kind_of(module) is not None or dequantisers.reads(module)


def base_of(module: nn.Module) -> ops.Base | str:
    """The layer's weight, the same object as long as nothing in it is replaced; or what keeps it from being read.

    Args:
        module: A layer that ``kind_of`` knows.
    """
    weight: Any = module._parameters["weight"]
    if weight is None or weight.is_meta:
        return "is offloaded or on the meta device"
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


def guard_layer(layer: Any, guards: Any) -> None:
    """All that ``LoraLinear.fastpeft_projection`` reads.

    Args:
        layer: The layer; this is a method of it.
        guards: What is told.
    """
    guard_lora(layer, guards)
    if kind_of(layer.base_layer):
        guard(guards, layer._modules, "base_layer")


def is_called(weight: Tensor | ops.Base, x: Tensor) -> bool:
    """Whether a quantised layer is to be called as it is for this x: of few rows, or in another dtype than its own."""
    if not isinstance(weight, ops.Base):
        return False
    return x.numel() <= FEW_ROWS * weight.shape[1] or weight.dtype not in (None, computed_dtype(x))


def own_bias(weight: Any, bias: Tensor | None, adapter: Tensor) -> bool:
    """Whether the bias has neither the dtype of the quantised weight nor the adapter's, so that it has to be cast."""
    return isinstance(weight, ops.Base) and bias is not None and bias.dtype not in (weight.dtype, adapter.dtype)


def as_given(y: Tensor, weight: Tensor | ops.Base, x: Tensor) -> Tensor:
    """An op's output in the dtype in which the frozen layer gives it: a quantised one in x's, under autocast too."""
    return y.to(x.dtype) if isinstance(weight, ops.Base) else y


def fitting_bias(bias: Tensor | None, weight: Any, x: Tensor, adapter: torch.dtype) -> Tensor | None:
    """The bias as an op takes it: its library casts one of another dtype to that in which it computes."""
    unfit = isinstance(weight, ops.Base) and bias is not None and bias.dtype != adapter
    return bias.to(computed_dtype(x)) if unfit and bias is not None else bias


def computed_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which an op computes with x: autocast's, or its own."""
    device = x.device.type
    if x.dtype == torch.float64 or device == "meta" or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


def _four_bit(module: nn.Module, weight: Any) -> tuple | str:
    state: Any = getattr(weight, "quant_state", None) or module.__dict__.get("quant_state")
    if state is None:
        return "is not quantised yet"
    if getattr(state, "packing_format_for_cpu", False):
        return "was repacked by bitsandbytes, for evaluation on a CPU"
    nested = state.state2 if getattr(state, "nested", False) else None
    if tuple(state.shape) != (module.out_features, module.in_features):
        return f"was quantised in shape {list(state.shape)}"
    if nested is not None and nested.code.numel() != 256:
        return "has scales in another format"
    tables = None if nested is None else (nested.absmax, nested.code, state.offset, nested.blocksize)
    dtype = module.__dict__.get("compute_dtype")
    return ops.four_bit, (_plain(weight), state.absmax, state.code, tuple(state.shape), state.blocksize, dtype, tables)


def _eight_bit(module: nn.Module, weight: Any) -> tuple | str:
    state: Any = module.__dict__["state"]
    codes, absmax = _codes(state, weight)
    if state.has_fp16_weights or codes is None or absmax is None:
        return "is not quantised yet, or at every call"
    if not module.training:
        return "is evaluated, where bitsandbytes multiplies in 8 bits"
    return ops.eight_bit, (_plain(codes), absmax)


def _codes(state: Any, weight: Any) -> tuple[Any, Any]:
    """Codes and scales in int8, which the first call moves from the weight to the state."""
    return (weight.CB, weight.SCB) if state.CB is None else (state.CB, state.SCB)


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


def written(module: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    """The layer's weight ``[N, K]``.

    Raises:
        ValueError: It cannot be read.
    """
    base: Any = dequantisers.base_of(module)
    if kind_of(module) is not None:
        four = kind_of(module) == "Linear4bit"
        base = base_of(module) if four else _eight_bit_base(module, module._parameters["weight"])
    if isinstance(base, str):
        raise ValueError(f"the weight {base}")
    return ops.dequantise(base, dtype)


def computed_in(module: nn.Module, model: nn.Module) -> torch.dtype | None:
    """The dtype in which a quantised layer's library multiplies; None for other layers.

    Args:
        module: The layer.
        model: That it is in: where the library multiplies in the input's, it is the dtype of what is not quantised.
    """
    if not is_read(module):
        return None
    found: Any = dequantisers.computed_in(module)
    if kind_of(module) == "Linear4bit":
        found = module.__dict__.get("compute_dtype")
    plain = (p.dtype for p in model.parameters() if type(p) is nn.Parameter and p.dtype in _check.FLOATS)
    return found or next(plain, torch.float32)


def requantised(module: nn.Module, delta: Tensor) -> nn.Parameter:
    """The layer's weight with ``delta`` ``[N, K]`` added, quantised again as its library does, and PEFT; not yet in it.

    Raises:
        ValueError: The weight cannot be read, or a sum is not finite.
    """
    weight: Any = module._parameters["weight"]
    state = getattr(weight, "quant_state", None)
    total = written(module, torch.float32 if state is None else state.dtype) + delta
    if not total.isfinite().all():
        raise ValueError("the merged weights are not all finite")
    own = {"bnb_quantized", "data", "requires_grad", "module", "quant_state", "CB", "SCB"}
    settings = {name: value for name, value in vars(weight).items() if name not in own and not name.startswith("_")}
    made = type(weight)(total.cpu(), requires_grad=False, **settings).to(weight.device)
    if state is not None:
        made.module = weight.module
    return made


def exchange(module: Any, weight: Any) -> Any:
    """Give the layer this weight, of its own kind, and return the one that it had."""
    before = module._parameters["weight"]
    if kind_of(module) == "Linear8bitLt":
        if before.CB is None:
            before.CB, before.SCB = module.state.CB, module.state.SCB
        module.state.reset_grads()
    else:
        module.quant_state = weight.quant_state
    module._parameters["weight"] = weight
    return before


def _eight_bit_base(module: Any, weight: Any) -> ops.Base | str:
    codes, absmax = _codes(module.state, weight)
    return "is not quantised yet" if codes is None or absmax is None else ops.eight_bit(_plain(codes), absmax)
