"""Which calls of a PEFT LoRA layer the fused op serves, and the op's arguments for those it does.

Everything is read again on every call, in a few microseconds, because all of it can change between two calls without
notice: adapters, scales, dropout modules, hooks, replaced weights. Nothing here imports peft: a layer is anything with
PEFT's attributes.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from .._check import PLAIN
from ..nn import dequantisers, quantised
from ..nn.front import front
from ..nn.guarding import GLOBAL_HOOKS, guard_child, guard_item, keep, kept
from ..nn.plain import transform
from ..nn.sharing import Branch
from . import _dora
from ._dora import Dora

_FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
_DEVICES = frozenset({"cpu", "cuda"})
_EMPTY: dict[str, object] = {}


class Beside(list):
    """Branches of a layer whose base is called as it is, without a weight; ``reason`` says why."""

    reason = ""


def plan(layer: Any, x: Tensor | None = None) -> list[Branch] | str:
    """One branch for each active adapter of ``layer``, the first with the base layer; or why PEFT serves the call.

    Where the base's weight cannot be read, they are ``Beside`` it. An adapter that is DoRA is the only one: ``Dora``.

    Args:
        x: the input; None stands for any plain tensor in the base weight's dtype and on its device.
    """
    if layer._disable_adapters:
        return "its adapters are disabled"
    if layer.merged_adapters:
        return "its adapters are merged into the base layer"
    modules = layer._modules
    weight = _weight(modules["base_layer"])
    if isinstance(weight, str):
        branches = _branches(layer, modules, None, None)
    else:
        branches = _branches(layer, modules, weight, _own(modules["base_layer"], "bias"))
    if isinstance(branches, str):
        return branches
    if isinstance(weight, str) and isinstance(branches, Dora):
        return f"its adapter is DoRA, and {weight}"
    if isinstance(weight, str):
        branches, branches.reason = Beside(branches), weight
    dense = weight if isinstance(weight, Tensor) else None
    return _unfit(layer, x, dense, branches) or _transformed() or branches


def kept_plan(layer: Any, x: Tensor | None = None) -> list[Branch] | str:
    """``plan``, or what it found before where everything that it read is as it was, which takes a microsecond."""
    found = kept(layer, x)
    if found is None:
        found = plan(layer, x)
        if type(found) is list and not is_conv1d(layer.base_layer):
            weight = found[0].weight
            keep(layer, (weight if isinstance(weight, Tensor) else found[0].lora_a) if x is None else x, found, front)
    return found


def guard(layer: Any, guards: Any) -> None:
    """All that ``plan`` reads of a layer, and with it ``fastpeft_branch`` and ``fastpeft_projection``.

    Args:
        layer: the layer; this is a method of it.
        guards: what is told.
    """
    modules, active = layer._modules, layer._active_adapter
    for name in ("_disable_adapters", "merged_adapters", "_active_adapter", "_modules", "scaling", "use_dora"):
        guard_item(guards, layer.__dict__, name)
    for name in ("lora_variant", "cast_input_dtype_enabled"):
        guard_item(guards, layer.__dict__, name)
    guards.empty(layer.merged_adapters)
    if not isinstance(active, str):
        guards.items(active)
    guard_child(guards, modules, "base_layer")
    if quantised.kind_of(modules["base_layer"]) is not None:
        quantised.guard(guards, modules, "base_layer")
    for part in ("lora_A", "lora_B", "lora_dropout"):
        guards.is_(modules, part, modules[part])
    for name in (active,) if isinstance(active, str) else active:
        guard_item(guards, getattr(layer, "lora_variant", _EMPTY), name)
        guard_item(guards, layer.use_dora, name)
        if layer.use_dora.get(name):
            _dora.guard(layer, guards, name)
        guard_item(guards, layer.scaling, name)
        if name not in modules["lora_A"]._modules:
            guards.absent(modules["lora_A"]._modules, name)
            continue
        for part in ("lora_A", "lora_B", "lora_dropout"):
            guard_child(guards, modules[part]._modules, name)
        for setting in ("p", "training", "inplace"):
            guard_item(guards, modules["lora_dropout"]._modules[name].__dict__, setting)


def alone(x: Tensor, branches: list[Branch]) -> bool:
    """Whether the base layer is to be called as it is for this x, and the low-rank terms added to what it gives."""
    weight = branches[0].weight
    return weight is None or (quantised.is_called(weight, x) and not isinstance(branches, Dora))


def beside(layer: Any, x: Tensor, branches: list[Branch]) -> Tensor:
    """What the base layer gives, with the terms of all adapters added to it."""
    y = layer._modules["base_layer"](x)
    first, *others = branches
    delta = run(x, [first._replace(weight=None, bias=None), *others])
    return y + delta.to(y.dtype)


def described(branches: list[Branch]) -> str:
    """What a report says of a plan."""
    return f"fused beside its base: {branches.reason}" if isinstance(branches, Beside) else "fused"


def run(x: Tensor, branches: list[Branch]) -> Tensor:
    """The fused op over a plan: one adapter, or the sum of several."""
    if isinstance(branches, Dora):
        return _dora.run(x, branches)
    weight, lora_a, lora_b, bias, scale, dropout, lora_bias = branches[0]
    if len(branches) == 1 and weight is not None and lora_bias is None and not isinstance(scale, Tensor):
        bias = quantised.fitting_bias(bias, weight, x, lora_a.dtype)
        return ops.lora_linear(x, weight, lora_a, lora_b, bias, scale, dropout)
    weights, lora_as, lora_bs, biases, scales, dropouts, lora_biases = map(list, zip(*branches, strict=True))
    stack = len(branches) > 1 and not any(dropouts)
    for i, scale in enumerate(scales):
        if lora_biases[i] is not None:
            term = scale * lora_biases[i]
            biases[0] = term if biases[0] is None else biases[0] + term
        # PEFT's compiled hot-swap makes scales tensors, and as tensors they stay, so that no new value recompiles.
        if stack or isinstance(scale, Tensor):
            lora_bs[i], scales[i] = lora_bs[i] * scale, 1.0
    if stack:  # without masks several adapters are one of the summed rank
        lora_as, lora_bs, weights = [torch.cat(lora_as)], [torch.cat(lora_bs, 1)], weights[:1]
    biases[0] = quantised.fitting_bias(biases[0], weights[0], x, lora_as[0].dtype)
    if len(weights) == 1 and weights[0] is not None:
        return ops.lora_linear(x, weights[0], lora_as[0], lora_bs[0], biases[0], scales[0], dropouts[0])
    y, *deltas = ops.lora_linear_shared(x, weights, lora_as, lora_bs, biases, scales, dropouts)
    return sum(deltas, y)


def is_conv1d(module: object) -> bool:
    """Exactly transformers' Conv1D, whose weight is ``[K, N]``."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def _weight(base: Any) -> Any:
    """The frozen weight ``[N, K]``, dense or quantised; or why it cannot be read and the layer must be called."""
    if _intercepted(base):
        return "base_layer has hooks or a replaced forward"
    kind = type(base)
    if kind is not nn.Linear and not is_conv1d(base):
        if quantised.kind_of(base) is not None:
            found = quantised.base_of(base)
            return f"base_layer {found}" if isinstance(found, str) else found
        other = dequantisers.base_of(base)
        if other is not None:
            return f"base_layer {other}" if isinstance(other, str) else other
        return f"base_layer is {_name(base)}, neither nn.Linear nor Conv1D"
    weight = _own(base, "weight")
    if type(weight) not in PLAIN:
        other = dequantisers.base_of(base)
        if other is not None:
            return f"base_layer {other}" if isinstance(other, str) else other
        return f"base_layer.weight is {_name(weight)}, not a plain tensor"
    return weight if kind is nn.Linear else weight.T


def _branches(layer: Any, modules: dict, weight: Any, bias: Tensor | None) -> list[Branch] | str:
    active = layer._active_adapter
    downs, ups, drops = modules["lora_A"]._modules, modules["lora_B"]._modules, modules["lora_dropout"]._modules
    variants = getattr(layer, "lora_variant", _EMPTY)
    found: list[Branch] = []
    magnitude: Any = None
    for name in (active,) if isinstance(active, str) else active:
        if name not in downs:
            continue
        if name in variants or layer.use_dora.get(name):
            magnitude = _dora.magnitude_of(layer, name, variants)
            if isinstance(magnitude, str):
                return f"adapter {name!r} is {magnitude}"
        down, up, drop, scale = downs[name], ups[name], drops[name], layer.scaling[name]
        if type(down) is not nn.Linear or type(up) is not nn.Linear or _own(down, "bias") is not None:
            return f"adapter {name!r}: lora_A and lora_B are {_name(down)} and {_name(up)}, not nn.Linear"
        if type(drop) is nn.Dropout:
            dropout = drop.p if drop.training and (magnitude is None or layer.training) else 0.0
            if dropout >= 1.0 or drop.inplace:
                return f"adapter {name!r}: lora_dropout is {drop}"
        elif type(drop) is nn.Identity:
            dropout = 0.0
        else:
            return f"adapter {name!r}: lora_dropout is {_name(drop)}, neither nn.Dropout nor nn.Identity"
        if _intercepted(down) or _intercepted(up) or _intercepted(drop):
            return f"adapter {name!r} has hooks or a replaced forward on its inner modules"
        if not isinstance(scale, (float, int)) and not (type(scale) in PLAIN and scale.dim() == 0):
            return f"adapter {name!r}: scaling is {scale!r}, neither a number nor a tensor without dimensions"
        a, b, lora_bias = _own(down, "weight"), _own(up, "weight"), _own(up, "bias")
        found.append(Branch(weight, a, b, bias, scale, dropout, lora_bias))
        weight = bias = None  # the other adapters add to the first
    return (found if magnitude is None else _dora.planned(found, magnitude)) or "no adapter is active"


def _unfit(layer: Any, x: Tensor | None, weight: Tensor | None, branches: list[Branch]) -> str | None:
    """Why the op cannot serve x; ``weight`` is the dense one, if there is one."""
    first, given = branches[0].lora_a, x is not None
    x = (first if weight is None else weight) if x is None else x
    if type(x) not in PLAIN:
        return f"the input is {_name(x)}, not a plain tensor"
    if x.layout is not torch.strided or x.is_nested or (weight is not None and weight.layout is not torch.strided):
        return "the input or base_layer.weight is sparse or nested"
    device, dtype, adapter_dtype = x.device, x.dtype, first.dtype
    base_dtype = dtype if weight is None else weight.dtype
    if device.type not in _DEVICES:
        return f"device {device.type}"
    read = branches[0].weight
    if read is not None and read.device != device:
        return f"the input is on {device}, base_layer on {read.device}"
    for branch in branches:
        a, b = branch.lora_a, branch.lora_b
        if type(a) not in PLAIN or type(b) not in PLAIN:
            return f"the adapter's weights are {_name(a)} and {_name(b)}, not plain tensors"
        if a.dtype != adapter_dtype or b.dtype != adapter_dtype:
            return "the adapters' weights differ in dtype"
        if a.device != device or b.device != device:
            return f"the input is on {device}, the adapter on {a.device} and {b.device}"
    reason = _dora.unfit(x, branches, given) if isinstance(branches, Dora) else None
    if reason is not None:
        return reason
    if dtype not in _FLOATS or base_dtype not in _FLOATS or adapter_dtype not in _FLOATS:
        return f"dtypes {dtype}, {base_dtype}, {adapter_dtype}"
    if dtype != torch.float64 and torch.is_autocast_enabled(device.type):
        return "float64 under autocast" if torch.float64 in (base_dtype, adapter_dtype) else None
    if dtype != base_dtype:
        return f"the input is {dtype}, base_layer {base_dtype}"
    if adapter_dtype == dtype:
        return None
    if adapter_dtype != torch.float32 or dtype == torch.float64:
        return f"the adapter is {adapter_dtype}, base_layer {base_dtype}"
    return None if getattr(layer, "cast_input_dtype_enabled", True) else "casting the input's dtype is disabled"


def _transformed() -> str | None:
    """Our gradient passes through no functorch, no forward mode, no tracing; exports keep to PyTorch's ops."""
    if any(GLOBAL_HOOKS):
        return "hooks for all modules are active"
    if torch.compiler.is_compiling():
        return "torch.export" if torch.compiler.is_exporting() else None
    return transform()


def _intercepted(module: nn.Module) -> bool:
    """Whether calling ``module`` does more than its class's forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _own(module: Any, name: str) -> Any:
    """A parameter, past nn.Module's slow ``__getattr__``; DataParallel's replicas hold theirs as plain attributes."""
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)


def _name(value: object) -> str:
    return type(value).__qualname__
