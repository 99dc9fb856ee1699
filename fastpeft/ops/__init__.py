"""The ops: one page each, with formula, checks, gradient and registration. Backends are chosen call by call."""

from importlib import import_module

from .bottleneck import bottleneck
from .lora_linear import lora_linear, lora_linear_shared
from .multi_lora import multi_lora, multi_lora_, multi_lora_shared
from .prompt_gather import prompt_gather
from .routing import route
from .row_linear import row_linear

__all__ = [
    "bottleneck",
    "explain",
    "lora_linear",
    "lora_linear_shared",
    "multi_lora",
    "multi_lora_",
    "multi_lora_shared",
    "prompt_gather",
    "route",
    "row_linear",
]


def explain(op: str, *args, **kwargs) -> str:
    """Which backend would serve ``fastpeft.ops.<op>(*args, **kwargs)``, how it is configured, and why not the others.

    >>> print(fastpeft.explain("lora_linear", x, weight, lora_a, lora_b))
    """
    if op not in __all__ or op == "explain":
        raise ValueError(
            f"explain: op is {op!r}, expected one of {', '.join(name for name in __all__ if name != 'explain')}"
        )
    page = {"route": "routing"}.get(op, op.removesuffix("_").removesuffix("_shared"))
    return import_module(f"{__name__}.{page}").explain(*args, **kwargs)
