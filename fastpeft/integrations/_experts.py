"""Experts of transformers with PEFT's LoRA on their parameters, served by ``fastpeft.ops.experts``.

PEFT wraps an experts module once for each of its parameters, and at every call puts ``W + scale · B A`` of all experts
in their place. Here the outermost wrapper computes the whole layer instead, with the low-rank terms beside the frozen
weights. In PEFT's tensors the expert is the slow index of ``lora_A [E · r, K]`` and the fast one of ``lora_B
[N, r · E]``. Everything is read again on every call, as in ``_fusable``. Nothing here imports peft: a wrapper is
anything with PEFT's attributes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from .._check import PLAIN
from ..nn.backend import serving_backend
from ..nn.lora import LoraLinear
from ..ops import ExpertLinear
from . import _fusable

_IMPLEMENTATIONS = (None, "eager", "grouped_mm", "batched_mm")  # one computation, three ways
_LLAMA4 = ("transformers.models.llama4.modeling_llama4", "Llama4TextExperts")


class Layout(NamedTuple):
    """Where an experts module keeps what, whichever model it is of.

    Attributes:
        up, down: names of the parameters; a bias has the name with ``_bias``.
        transposed: weights are ``[E, K, N]``. bias: there are biases.
        activation: from the output of up to the input of down.
    """

    up: str
    down: str
    transposed: bool
    bias: bool
    activation: Callable[[Tensor], Tensor]


def layout_of(module: Any) -> Layout | str:
    """The layout of one of transformers' experts modules, or what it is instead."""
    kind = type(module)
    if (kind.__module__, kind.__name__) == _LLAMA4:
        return Layout("gate_up_proj", "down_proj", True, False, lambda u: _llama4_gate(module, u))
    code = getattr(kind.forward, "__code__", None)
    if code is None or "experts_interface" not in code.co_freevars:  # of transformers' use_experts_implementation
        return f"{kind.__qualname__} is no experts module of transformers"
    return _registered_layout(module)


def _registered_layout(module: Any) -> Layout | str:
    if getattr(module, "has_post_expert_norm", False):
        return f"{type(module).__qualname__} has a norm after each expert"
    up, activation = ("gate_up_proj", module._apply_gate) if module.has_gate else ("up_proj", module.act_fn)
    return Layout(up, "down_proj", module.is_transposed, module.has_bias, activation)


def _llama4_gate(module: Any, u: Tensor) -> Tensor:
    gate, up = u.chunk(2, dim=-1)
    return up * module.act_fn(gate)


class Plan(NamedTuple):
    """What ``ops.experts`` is called with beside the tokens."""

    up: ExpertLinear
    down: ExpertLinear
    activation: Callable[[Tensor], Tensor]
    llama4: bool


class ExpertsForward(nn.Module):
    """The forward of a PEFT wrapper around a parameter of experts; a class of PEFT's stands behind it."""

    fastpeft_kind = LoraLinear.fastpeft_kind

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        if not kwargs:
            found = plan(self, x, *args)
            if isinstance(found, Plan):
                return run(found, x, *args)
        return super().forward(x, *args, **kwargs)

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


def run(found: Plan, x: Tensor, *args: Tensor) -> Tensor:
    """The fused op over a plan."""
    if found.llama4:  # every expert has its own copy of all tokens, weighted already
        x, count = x.reshape(-1, x.shape[-1]), len(found.up.weight)
        args = torch.arange(len(x), device=x.device)[:, None] // max(1, len(x) // count), x.new_ones(len(x), 1)
    return ops.experts(x, args[0], args[1], found.up, found.down, found.activation)


def is_wrapper(module: Any) -> bool:
    """Whether this is PEFT's wrapper around one parameter of a module."""
    return "lora_A" in module._modules and "base_layer" in module._modules and hasattr(module, "parameter_name")


def innermost(wrapper: Any) -> Any:
    """The module whose parameters a nest of wrappers adapts."""
    while is_wrapper(wrapper):
        wrapper = wrapper._modules["base_layer"]
    return wrapper


def plan(wrapper: Any, x: Tensor | None = None, *args: Tensor) -> Plan | str:
    """The call of ``ops.experts`` that computes the nest of wrappers, or why PEFT serves the call.

    Args:
        x, args: of the call; None stands for any that fit.
    """
    base, nest = innermost(wrapper), []
    while wrapper is not base:
        nest.append(wrapper)
        wrapper = wrapper._modules["base_layer"]
    llama4 = type(base).__name__ == _LLAMA4[1]
    reason = _unfit(base, llama4, x, args)
    if reason is not None:
        return reason
    layout = layout_of(base) if llama4 else _registered_layout(base)
    if isinstance(layout, str):
        return layout
    if any(map(_fusable._intercepted, nest[1:])):
        return "an inner wrapper has hooks or a replaced forward"
    terms: dict[str, list[_Term]] = {}
    for wrapper in nest:
        active = _terms(wrapper)
        if isinstance(active, str):
            return active
        terms[wrapper.parameter_name] = active
    up, down = (_linear(base, name, layout, terms) for name in (layout.up, layout.down))
    if isinstance(up, str):
        return up
    if isinstance(down, str):
        return down
    if up.weight.dtype != down.weight.dtype:
        return f"the experts' weights are {up.weight.dtype} and {down.weight.dtype}"
    if terms:
        return f"parameter {next(iter(terms))} is none of {layout.up} and {layout.down}"
    return _fusable._transformed() or Plan(up, down, layout.activation, llama4)


def _unfit(base: Any, llama4: bool, x: Tensor | None, args: tuple) -> str | None:
    if "parametrizations" in base._modules:
        return "the experts module is parametrised"
    if any(map(_fusable._intercepted, (base, *base._modules.values()))):
        return "the experts module has hooks or a replaced forward"
    if not llama4 and base.config._experts_implementation not in _IMPLEMENTATIONS:
        return f"the experts' implementation is {base.config._experts_implementation!r}"
    tensors = () if x is None else (x, *args)
    if x is not None and len(args) != (0 if llama4 else 2):
        return f"the experts are called with {1 + len(args)} arguments"
    if any(type(t) not in PLAIN for t in tensors):
        return "an input is not a plain tensor"
    if tensors and (tensors[0].dtype not in _fusable._FLOATS or tensors[0].device.type not in _fusable._DEVICES):
        return f"the input is {tensors[0].dtype} on {tensors[0].device}"
    if x is not None and not llama4 and (x.dim() != 2 or args[0].dtype not in (torch.int32, torch.int64)):
        return f"the input is {list(x.shape)}, the experts' index {args[0].dtype}"
    return None


class _Term(NamedTuple):
    """One adapter of one parameter, as PEFT stores it; ``swapped``: its output is the parameter's second dimension."""

    lora_a: Tensor
    lora_b: Tensor
    scale: float
    swapped: bool


def _terms(wrapper: Any) -> list[_Term] | str:
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
        if _fusable._own(down, "bias") is not None or _fusable._own(up, "bias") is not None:
            return f"adapter {name!r} has a bias"
        if not isinstance(scale, float | int):
            return f"adapter {name!r}: scaling is {scale!r}, not a number"
        weights = _fusable._own(down, "weight"), _fusable._own(up, "weight")
        found.append(_Term(*weights, scale, wrapper._did_swap_in_out_features))
    return found


def _linear(base: Any, name: str, layout: Layout, terms: dict[str, list[_Term]]) -> ExpertLinear | str:
    """One projection, with what ``terms`` has for its weight and its bias, which is taken out."""
    weight: Tensor = _fusable._own(base, name)
    bias: Any = _fusable._own(base, f"{name}_bias") if layout.bias else None
    pairs = terms.pop(name, [])
    of_bias = terms.pop(f"{name}_bias", []) if layout.bias else []
    dtypes = weight.dtype, torch.promote_types(weight.dtype, torch.float32)
    tensors = [weight, *(t for term in (*pairs, *of_bias) for t in term[:2]), *([] if bias is None else [bias])]
    if any(type(t) not in PLAIN or t.device != weight.device for t in tensors):
        return f"{name}, its bias or its adapter is not a plain tensor, or they are on several devices"
    if weight.dim() != 3 or weight.dtype not in _fusable._FLOATS:
        return f"{name} is {weight.dtype} {list(weight.shape)}"
    if any(t.dtype not in dtypes or t.dtype != tensors[1].dtype for pair in pairs for t in pair[:2]):
        return f"{name} is {weight.dtype}, its adapters {', '.join(str(term.lora_a.dtype) for term in pairs)}"
    for a, b, scale, _ in of_bias:  # a matrix of two dimensions, for which PEFT has one adapter
        bias = bias + (scale * b @ a).to(bias.dtype)
    weight = weight.mT if layout.transposed else weight
    if not pairs:
        return ExpertLinear(weight, bias)
    return ExpertLinear(weight, bias, *_stacked(pairs, len(weight), layout.transposed))


def _stacked(terms: list[_Term], experts: int, transposed: bool) -> tuple[Tensor, Tensor, float]:
    """PEFT's tensors as ``[E, r, K]`` and ``[E, N, r]``; several adapters are one of the summed rank."""
    lora_as, lora_bs = [], []
    for term in terms:
        a = term.lora_a.view(experts, -1, term.lora_a.shape[1])
        b = term.lora_b.view(len(term.lora_b), -1, experts).permute(2, 0, 1)
        if term.swapped == transposed:  # Llama 4 does not say that its weights are transposed: B is on x's side
            a, b = b.mT, a.mT
        lora_as.append(a)
        lora_bs.append(b)
    if len(terms) == 1:
        return lora_as[0], lora_bs[0], terms[0].scale
    lora_bs = [b * term.scale for b, term in zip(lora_bs, terms, strict=True)]
    return torch.cat(lora_as, 1), torch.cat(lora_bs, 2), 1.0
