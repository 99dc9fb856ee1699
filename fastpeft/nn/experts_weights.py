"""The parameters of an experts module and what LoRA adds to them: which can be adapted, their sizes, their sums."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _check
from .adapter import LoraAdapter
from .experts_call import Term, by_expert, own


def sizes(base: Any, parameter: str) -> tuple[int, int, int]:
    """How many matrices a parameter has, K of A and N of B for it, by PEFT's rule.

    Args:
        base: The module that has the parameter.
        parameter: Its name.
    """
    shape = own(base, parameter).shape
    if len(shape) == 2:
        return 1, shape[1], shape[0]
    return (shape[0], shape[2], shape[1]) if swapped(base, parameter) else (shape[0], shape[1], shape[2])


def unadaptable_reason(base: Any, parameter: str) -> str | None:
    """What keeps LoRA from a parameter, as the end of a sentence about it, or None.

    Args:
        base: The module that has the parameter.
        parameter: Its name.
    """
    if "parametrizations" in base._modules and parameter in base._modules["parametrizations"]._modules:
        return "parametrised"
    tensor = base._parameters.get(parameter)
    if tensor is None:
        return "not there"
    if type(tensor) not in _check.PLAIN or tensor.dtype not in _check.FLOATS:
        return f"a {type(tensor).__name__} of {tensor.dtype}"
    return None if tensor.dim() in (2, 3) else f"of {tensor.dim()} dimensions, expected 2 or 3"


def swapped(base: Any, parameter: str) -> bool:
    """Whether K is the parameter's last dimension: one of three that the module does not say to be transposed.

    Args:
        base: The module that has the parameter.
        parameter: Its name.
    """
    return own(base, parameter).dim() == 3 and not getattr(base, "is_transposed", False)


def composed(base: Any, parameter: str, terms: Sequence[Term]) -> Tensor:
    """``W + Σ scale · B A``, differentiable in A and B, in the weight's dtype.

    Args:
        base: The module that has the parameter.
        parameter: Its name.
        terms: What is added.
    """
    weight = value = own(base, parameter)
    for term in terms:
        a, b = by_expert(term.lora_a, term.lora_b, sizes(base, parameter)[0])
        delta = term.scale * (b @ a)
        value = value + (delta[0] if weight.dim() == 2 else delta if term.swapped else delta.mT)
    return value.to(weight.dtype)


def deltas(base: Any, parameter: str, pairs: Sequence[LoraAdapter]) -> Iterator[Tensor]:
    """``Σ scale · B_e A_e`` of each expert e, laid out as the parameter is, in float32 or wider.

    Args:
        base: The module that has the parameter.
        parameter: Its name.
        pairs: At least one adapter of it.
    """
    weight, experts = own(base, parameter), sizes(base, parameter)[0]
    dtype = torch.promote_types(weight.dtype, torch.float32)
    views = [(*by_expert(pair.lora_A.to(dtype), pair.lora_B.to(dtype), experts), pair.scale) for pair in pairs]
    turned = weight.dim() == 3 and not swapped(base, parameter)
    for e in range(experts):
        delta: Any = sum(scale * (b[e] @ a[e]) for a, b, scale in views)
        yield delta.mT if turned else delta


def merged(base: Any, parameter: str, pairs: Sequence[LoraAdapter]) -> Tensor:
    """The parameter with these adapters added, each expert rounded once.

    Args:
        base: The module that has the parameter.
        parameter: Its name.
        pairs: At least one adapter of it.

    Raises:
        ValueError: A merged value is not finite.
    """
    value = own(base, parameter).detach().clone()
    for matrix, delta in zip(value if value.dim() == 3 else value[None], deltas(base, parameter, pairs), strict=True):
        matrix.copy_(matrix + delta)
    if not value.isfinite().all():
        raise ValueError(f"the merged {parameter} is not all finite")
    return value
