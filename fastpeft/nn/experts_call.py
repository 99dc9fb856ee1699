"""Experts modules of transformers, whichever model they are of, as a call of ``fastpeft.ops.experts``.

In the tensors of an adapter, which are PEFT's, the expert is the slow index of ``lora_A [E · r, K]`` and the fast one
of ``lora_B [N, r · E]``. What can change between two calls is read again on every call.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from .._check import FLOATS, PLAIN
from ..ops import ExpertLinear
from .branch import own_path_reason

_IMPLEMENTATIONS = (None, "eager", "grouped_mm", "batched_mm")  # one computation, three ways
_DEVICES = frozenset({"cpu", "cuda"})
_LLAMA4 = ("transformers.models.llama4.modeling_llama4", "Llama4TextExperts")


class Layout(NamedTuple):
    """Where an experts module keeps what.

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
    if _is_llama4(module):
        return Layout("gate_up_proj", "down_proj", True, False, lambda u: _llama4_gate(module, u))
    code = getattr(type(module).forward, "__code__", None)
    if code is None or "experts_interface" not in code.co_freevars:  # of transformers' use_experts_implementation
        return f"{type(module).__qualname__} is no experts module of transformers"
    return _registered_layout(module)


def _is_llama4(module: Any) -> bool:
    return (type(module).__module__, type(module).__name__) == _LLAMA4


def _registered_layout(module: Any) -> Layout | str:
    if getattr(module, "has_post_expert_norm", False):
        return f"{type(module).__qualname__} has a norm after each expert"
    up, activation = ("gate_up_proj", module._apply_gate) if module.has_gate else ("up_proj", module.act_fn)
    return Layout(up, "down_proj", module.is_transposed, module.has_bias, activation)


def _llama4_gate(module: Any, u: Tensor) -> Tensor:
    gate, up = u.chunk(2, dim=-1)
    return up * module.act_fn(gate)


class Term(NamedTuple):
    """One adapter of one parameter, as PEFT stores it.

    Attributes:
        lora_a, lora_b: ``[E · r, K]`` and ``[N, r · E]``.
        scale: factor of their product. dropout: probability that holds for this call.
        swapped: K is the parameter's last dimension, as wherever the module does not say that it is transposed.
    """

    lora_a: Tensor
    lora_b: Tensor
    scale: float
    swapped: bool
    dropout: float = 0.0


class ExpertsCall(NamedTuple):
    """What ``ops.experts`` is called with beside the tokens."""

    up: ExpertLinear
    down: ExpertLinear
    activation: Callable[[Tensor], Tensor]
    llama4: bool


def run(found: ExpertsCall, x: Tensor, *args: Tensor) -> Tensor:
    """The fused op over what ``call_of`` found."""
    return ops.experts(*choices(found, x, *args), found.up, found.down, found.activation)


def choices(found: ExpertsCall, x: Tensor, *args: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens ``[T, H]``, each one's experts and their weights ``[T, k]``, of what the module is called with.

    Args:
        found: What ``call_of`` found.
        x, args: Of the call.
    """
    if not found.llama4:
        return x, args[0], args[1]
    x, count = x.reshape(-1, x.shape[-1]), len(found.up.weight)  # every expert's copy of all tokens, weighted already
    return x, torch.arange(len(x), device=x.device)[:, None] // max(1, len(x) // count), x.new_ones(len(x), 1)


def call_of(base: Any, terms: Mapping[str, Sequence[Term]], x: Tensor | None = None, *args: Tensor) -> Any:
    """The call of ``ops.experts`` that computes an experts module with adapters, or why there is none.

    Args:
        base: The module, for which ``layout_of`` finds a layout or says that it has none that is served.
        terms: By the parameters' names.
        x, args: Of the call; None stands for any that fit.
    """
    reason = _unfit(base, type(base).__name__ == _LLAMA4[1], x, args)
    return fused_call(base, terms) if reason is None else reason


def fused_call(base: Any, terms: Mapping[str, Sequence[Term]]) -> Any:
    """The same, whoever calls the module and with what.

    Args:
        base: The module.
        terms: By the parameters' names.
    """
    llama4 = type(base).__name__ == _LLAMA4[1]  # what torch.compile follows; layout_of has looked at the rest
    layout = layout_of(base) if llama4 else _registered_layout(base)
    if isinstance(layout, str):
        return layout
    rest = dict(terms)
    up, down = (_projection(base, name, layout, rest) for name in (layout.up, layout.down))
    for found in (up, down):
        if isinstance(found, str):
            return found
    if up.weight.dtype != down.weight.dtype:
        return f"the experts' weights are {up.weight.dtype} and {down.weight.dtype}"
    if rest:
        return f"parameter {next(iter(rest))} is none of {layout.up} and {layout.down}"
    return ExpertsCall(up, down, layout.activation, llama4)


def _unfit(base: Any, llama4: bool, x: Tensor | None, args: tuple) -> str | None:
    if "parametrizations" in base._modules:
        return "the experts module is parametrised"
    if any(own_path_reason(module) is not None for module in (base, *base._modules.values())):
        return "the experts module has hooks or a replaced forward"
    if not llama4 and base.config._experts_implementation not in _IMPLEMENTATIONS:
        return f"the experts' implementation is {base.config._experts_implementation!r}"
    tensors = () if x is None else (x, *args)
    if x is not None and len(args) != (0 if llama4 else 2):
        return f"the experts are called with {1 + len(args)} arguments"
    if any(type(t) not in PLAIN for t in tensors):
        return "an input is not a plain tensor"
    if tensors and (tensors[0].dtype not in FLOATS or tensors[0].device.type not in _DEVICES):
        return f"the input is {tensors[0].dtype} on {tensors[0].device}"
    if x is not None and not llama4 and (x.dim() != 2 or args[0].dtype not in (torch.int32, torch.int64)):
        return f"the input is {list(x.shape)}, the experts' index {args[0].dtype}"
    return None


def _projection(base: Any, name: str, layout: Layout, terms: dict[str, Sequence[Term]]) -> Any:
    """One projection, with what ``terms`` has for its weight and its bias, which is taken out; or why there is none."""
    weight: Tensor = own(base, name)
    bias: Any = own(base, f"{name}_bias") if layout.bias else None
    pairs = terms.pop(name, ())
    of_bias = terms.pop(f"{name}_bias", ()) if layout.bias else ()
    dtypes = weight.dtype, torch.promote_types(weight.dtype, torch.float32)
    tensors = [weight, *(t for term in (*pairs, *of_bias) for t in term[:2]), *([] if bias is None else [bias])]
    if any(type(t) not in PLAIN or t.device != weight.device for t in tensors):
        return f"{name}, its bias or its adapter is not a plain tensor, or they are on several devices"
    if weight.dim() != 3 or weight.dtype not in FLOATS:
        return f"{name} is {weight.dtype} {list(weight.shape)}"
    if any(t.dtype not in dtypes or t.dtype != tensors[1].dtype for pair in pairs for t in pair[:2]):
        return f"{name} is {weight.dtype}, its adapters {', '.join(str(term.lora_a.dtype) for term in pairs)}"
    if len({term.dropout for term in pairs}) > 1:
        return f"the adapters of {name} drop with {', '.join(str(term.dropout) for term in pairs)}"
    for term in of_bias:  # a matrix of two dimensions, for which PEFT has one adapter
        bias = bias + (term.scale * term.lora_b @ term.lora_a).to(bias.dtype)
    weight = weight.mT if layout.transposed else weight
    if not pairs:
        return ExpertLinear(weight, bias)
    return ExpertLinear(weight, bias, *_stacked(pairs, len(weight), layout.transposed), pairs[0].dropout)


def _stacked(terms: Sequence[Term], experts: int, transposed: bool) -> tuple[Tensor, Tensor, float]:
    """PEFT's tensors as ``[E, r, K]`` and ``[E, N, r]``; several adapters are one of the summed rank."""
    lora_as, lora_bs = [], []
    for term in terms:
        a, b = by_expert(term.lora_a, term.lora_b, experts)
        if term.swapped == transposed:  # Llama 4 does not say that its weights are transposed: B is on x's side
            a, b = b.mT, a.mT
        lora_as.append(a)
        lora_bs.append(b)
    if len(terms) == 1:
        return lora_as[0], lora_bs[0], terms[0].scale
    lora_bs = [b * term.scale for b, term in zip(lora_bs, terms, strict=True)]
    return torch.cat(lora_as, 1), torch.cat(lora_bs, 2), 1.0


def by_expert(lora_a: Tensor, lora_b: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Views ``[E, r, K]`` and ``[E, N, r]`` of PEFT's ``[E · r, K]`` and ``[N, r · E]``."""
    return lora_a.view(experts, -1, lora_a.shape[1]), lora_b.view(len(lora_b), -1, experts).permute(2, 0, 1)


def own(module: nn.Module, name: str) -> Any:
    """A parameter, past nn.Module's slow ``__getattr__``; DataParallel's replicas hold theirs as plain attributes."""
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)
