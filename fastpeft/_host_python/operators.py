"""How operators of PyTorch are called that were recorded by their names: the same operator by its cheapest entry."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_FUNCTIONS = torch._C._VariableFunctions
_ALLOCATORS: Any = torch._C._dynamo.guards
# What a name in Python, given the same arguments, comes to: its parser takes half of the time of the operator's own.
_QUICK: dict[str, Callable] = {
    "aten::addmm_": Tensor.addmm_,
    "aten::cat": _FUNCTIONS.cat,
    "aten::randint": _FUNCTIONS.randint,
}
# Of Inductor: allocation on the current device of the kind, past the dispatcher: ``(sizes, strides, dtype)``.
EMPTY: dict[str, Callable] = {"cpu": _ALLOCATORS._empty_strided_cpu, "cuda": _ALLOCATORS._empty_strided_cuda}


def called(name: str, overload: str, arguments: Sequence) -> tuple[Callable, list, dict[str, Any]]:
    """The function, and its arguments by position and by name, without those that are defaults.

    Args:
        name: the operator's namespace and name; overload: of it.
        arguments: all of them, in the schema's order.
    """
    space, _, plain = name.partition("::")
    op = getattr(getattr(getattr(torch.ops, space), plain), overload or "default")
    schema = list(zip(op._schema.arguments, arguments, strict=True))
    given = [(argument, value) for argument, value in schema if not argument.kwarg_only]
    while given and _is_default(*given[-1]):
        given.pop()
    named = {a.name: value for a, value in schema if a.kwarg_only and not _is_default(a, value)}
    quick = None if overload else _QUICK.get(name)
    return quick or op._op, [value for _, value in given], named


def _is_default(argument: Any, value: Any) -> bool:
    if not argument.has_default_value() or type(value) is not type(argument.default_value):
        return False
    return type(value) in (int, float, bool, str, type(None)) and value == argument.default_value
