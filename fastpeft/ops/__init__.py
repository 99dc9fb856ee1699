"""The ops: one page each, with formula, checks, gradient and registration. Backends are chosen call by call."""

from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from importlib import import_module
from inspect import signature

from torch import Tensor

from .. import _backend, _check
from .._backend import Explanation
from .base import Base, eight_bit, four_bit, written_by
from .bottleneck import bottleneck
from .dequantise import dequantise
from .dora_linear import dora_linear, dora_norm
from .dora_mlp import dora_mlp
from .experts import ExpertLinear, experts
from .lora_embedding import lora_embedding
from .lora_linear import lora_linear, lora_linear_shared
from .lora_mlp import lora_mlp
from .multi_lora import multi_lora, multi_lora_, multi_lora_shared
from .prompt_gather import prompt_gather
from .routing import route
from .row_linear import row_linear

__all__ = [
    "Base",
    "ExpertLinear",
    "Explanation",
    "bottleneck",
    "dequantise",
    "dora_linear",
    "dora_mlp",
    "dora_norm",
    "eight_bit",
    "experts",
    "explain",
    "four_bit",
    "lora_embedding",
    "lora_linear",
    "lora_linear_shared",
    "lora_mlp",
    "multi_lora",
    "multi_lora_",
    "multi_lora_shared",
    "prompt_gather",
    "route",
    "row_linear",
    "written_by",
]

_OTHERS = ("Base", "ExpertLinear", "Explanation", "dora_norm", "eight_bit", "explain", "four_bit", "written_by")
OPS = tuple(name for name in __all__ if name not in _OTHERS)
_UNPLANNED = ("dequantise", "lora_embedding", "prompt_gather", "route")  # called once a step, or inside of another


def explain(op: str, *args, **kwargs) -> Explanation:
    """Which backend would serve ``fastpeft.ops.<op>(*args, **kwargs)``, how it is configured, and why not the others.

    >>> print(fastpeft.explain("lora_linear", x, weight, lora_a, lora_b))

    Args:
        op: the name of a function of ``fastpeft.ops``.
        args: its arguments, by place. Those that nothing depends on, of the last ones, may be left out.
        kwargs: its arguments, by name; ``backend`` asks for one, as in the call.

    Returns:
        The choice; its ``str`` is a text to read, its attributes are ``op``, ``backend``, ``configuration`` and
        ``reasons``.

    Raises:
        TypeError: the op has no such argument, or one that the choice depends on is missing or no tensor.
        ValueError: there is no such op, or the backend that is asked for cannot serve the call.
    """
    _check.one_of("explain", "op", op, OPS)
    page = {"route": "routing"}.get(op, op.removesuffix("_").removesuffix("_shared"))
    module, given = import_module(f"{__name__}.{page}"), _bound(op, globals()[op], args, kwargs)
    try:
        facts = module.facts(given)
    except KeyError as error:
        raise TypeError(f"explain: {op} needs {error.args[0]} beside {', '.join(given) or 'nothing'}") from None
    files = {"dora_mlp": "lora_mlp"}.get(page, page)  # it has no kernels but those of its parts
    return _backend.explain(op, files, given.get("backend"), module.REASONS, *facts, planned=op not in _UNPLANNED)


def _bound(op: str, function: Callable, args: Sequence, kwargs: Mapping) -> dict:
    """Arguments by name; what is None is left out, since None stands for what is not given."""
    parameters = signature(function).parameters
    for name in kwargs:
        if name not in parameters:
            near = get_close_matches(name, parameters, 1) or parameters
            raise TypeError(f"explain: {op} has no argument {name!r}, expected {' or '.join(near)}")
    try:
        given = signature(function).bind_partial(*args, **kwargs).arguments
    except TypeError as error:
        raise TypeError(f"explain: {op}: {error}") from None
    for name, value in given.items():
        if value is not None and parameters[name].annotation is Tensor and not isinstance(value, Tensor):
            raise TypeError(f"explain: {name} is {_check.shown(value)}, expected a tensor")
    return {name: value for name, value in given.items() if value is not None}
