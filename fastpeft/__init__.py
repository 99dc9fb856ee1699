"""fastpeft: fused kernels for parameter-efficient fine-tuning, behind thin PyTorch modules.

    import fastpeft
    fastpeft.attach(model, fastpeft.Lora(r=16, alpha=32, dropout=0.1))   # any nn.Module
    fastpeft.accelerate(peft_model)                                      # or an existing PeftModel, in place

Importing is cheap: every name below is loaded on first use, so neither torch nor Triton nor PEFT is imported before it
is needed, CUDA is not touched, and the order of imports does not matter.
"""

from . import _bridge  # noqa: F401  first: makes fastpeft.kernels importable from a checkout

__version__ = "0.1.0"

_MODULES = ("integrations", "methods", "nn", "ops", "reference", "serving", "testing")
_HOME = {
    "Bottleneck": "methods",
    "Lora": "methods",
    "PrefixTuning": "methods",
    "PromptTuning": "methods",
    "attach": "methods",
    "detach": "methods",
    "disable_adapter": "methods",
    "load": "methods",
    "merge": "methods",
    "per_row": "methods",
    "report": "methods",
    "save": "methods",
    "set_adapter": "methods",
    "unmerge": "methods",
    "LisaSchedule": "methods",
    "Selection": "methods",
    "Selective": "methods",
    "load_selective": "methods",
    "select": "methods",
    "accelerate": "integrations.models",
    "register": "integrations.peft",
    "restore": "integrations.models",
    "explain": "ops",
}

__all__ = [*_MODULES, *_HOME]


def __getattr__(name):
    from importlib import import_module

    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name in _HOME:
        value = globals()[name] = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *__all__})
