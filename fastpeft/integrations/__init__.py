"""One file for each ecosystem; each is the only place that imports its package, and is itself imported on first use."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import adapters as adapters
    from . import models as models
    from . import peft as peft
    from . import sglang as sglang
    from . import transformers as transformers
    from . import vllm as vllm

__all__ = ["adapters", "models", "peft", "sglang", "transformers", "vllm"]  # pyright: ignore[reportUnsupportedDunderAll]

if not TYPE_CHECKING:  # a checker that saw this would take every misspelt name for a value of any type

    def __getattr__(name):
        from importlib import import_module

        if name in __all__:
            return import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), *__all__})
