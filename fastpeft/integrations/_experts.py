"""Experts of transformers with PEFT's LoRA on their parameters, served by ``fastpeft.ops.experts``.

PEFT wraps an experts module once for each of its parameters, and at every call puts ``W + scale · B A`` of all experts
in their place. Here the outermost wrapper computes the whole layer instead, with the low-rank terms beside the frozen
weights. Everything is read again on every call, as in ``_fusable``. Nothing here imports peft: a wrapper is anything
with PEFT's attributes.
"""

from typing import Any

from torch import Tensor, nn

from ..nn.backend import serving_backend
from ..nn.experts_call import ExpertsCall, Term, call_of, own, run
from ..nn.lora import LoraLinear
from . import _fusable


class ExpertsForward(nn.Module):
    """The forward of a PEFT wrapper around a parameter of experts; a class of PEFT's stands behind it."""

    fastpeft_kind = LoraLinear.fastpeft_kind

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        if not kwargs:
            found = plan(self, x, *args)
            if isinstance(found, ExpertsCall):
                return run(found, x, *args)
        return super().forward(x, *args, **kwargs)

    def fastpeft_branch(self) -> str:
        """Why it shares no input."""
        return "it is an experts module"

    def fastpeft_report(self) -> str:
        """``"fused"``, or why PEFT's own forward serves this layer as it is now."""
        found = plan(self)
        return found if isinstance(found, str) else "fused"

    def fastpeft_backend(self) -> str:
        """The backend that serves ``ops.experts`` on the layer's tensors."""
        found = plan(self)
        if isinstance(found, str):
            return found
        x = found.up.weight.new_empty(1, found.up.weight.shape[2])
        return serving_backend("experts", x, up=found.up, down=found.down)


def is_wrapper(module: Any) -> bool:
    """Whether this is PEFT's wrapper around one parameter of a module."""
    return "lora_A" in module._modules and "base_layer" in module._modules and hasattr(module, "parameter_name")


def innermost(wrapper: Any) -> Any:
    """The module whose parameters a nest of wrappers adapts."""
    while is_wrapper(wrapper):
        wrapper = wrapper._modules["base_layer"]
    return wrapper


def plan(wrapper: Any, x: Tensor | None = None, *args: Tensor) -> ExpertsCall | str:
    """The call of ``ops.experts`` that computes the nest of wrappers, or why PEFT serves the call.

    Args:
        x, args: of the call; None stands for any that fit.
    """
    base, nest = innermost(wrapper), []
    while wrapper is not base:
        nest.append(wrapper)
        wrapper = wrapper._modules["base_layer"]
    if any(map(_fusable._intercepted, nest[1:])):
        return "an inner wrapper has hooks or a replaced forward"
    terms: dict[str, list[Term]] = {}
    for wrapper in nest:
        active = _terms(wrapper)
        if isinstance(active, str):
            return active
        terms[wrapper.parameter_name] = active
    found = call_of(base, terms, x, *args)
    return found if isinstance(found, str) else _fusable._transformed() or found


def _terms(wrapper: Any) -> list[Term] | str:
    """The active adapters of a wrapper's parameter."""
    if wrapper._disable_adapters:
        return "its adapters are disabled"
    if wrapper.merged_adapters:
        return "its adapters are merged into the base layer"
    active, modules, found = wrapper._active_adapter, wrapper._modules, []
    for name in (active,) if isinstance(active, str) else active:
        if name not in modules["lora_A"]._modules:
            continue
        down, up, drop = (modules[part]._modules[name] for part in ("lora_A", "lora_B", "lora_dropout"))
        scale = wrapper.scaling[name]
        if type(down) is not nn.Linear or type(up) is not nn.Linear or type(drop) is not nn.Identity:
            return f"adapter {name!r} is made of {type(down).__name__}, {type(up).__name__}, {type(drop).__name__}"
        if any(map(_fusable._intercepted, (down, up, drop))):
            return f"adapter {name!r} has hooks or a replaced forward on its inner modules"
        if own(down, "bias") is not None or own(up, "bias") is not None:
            return f"adapter {name!r} has a bias"
        if not isinstance(scale, float | int):
            return f"adapter {name!r}: scaling is {scale!r}, not a number"
        weights = own(down, "weight"), own(up, "weight")
        found.append(Term(*weights, scale, wrapper._did_swap_in_out_features))
    return found
