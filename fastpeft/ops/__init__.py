"""The ops: one page each, with formula, checks, gradient and registration. Backends are chosen call by call."""

from importlib import import_module

from .lora_linear import lora_linear, lora_linear_shared

_PAGES = ("lora_linear",)
__all__ = ["explain", "lora_linear", "lora_linear_shared"]


def explain(op: str, *args, **kwargs) -> str:
    """Which backend would serve ``fastpeft.ops.<op>(*args, **kwargs)``, how it is configured, and why not the others.

    >>> print(fastpeft.explain("lora_linear", x, weight, lora_a, lora_b))
    """
    if op not in __all__ or op == "explain":
        raise ValueError(
            f"explain: op is {op!r}, expected one of {', '.join(name for name in __all__ if name != 'explain')}"
        )
    return import_module(f"{__name__}.{op}").explain(*args, **kwargs)
