"""fastpeft: fused kernels for parameter-efficient fine-tuning, behind thin PyTorch modules.

    import fastpeft
    fastpeft.attach(model, fastpeft.Lora(r=16, alpha=32, dropout=0.1))   # any nn.Module
    fastpeft.accelerate(peft_model)                                      # or an existing PeftModel, in place

Importing is cheap: every name below is loaded on first use, so neither torch nor Triton nor PEFT is imported before it
is needed, CUDA is not touched, and the order of imports does not matter. Type checkers and editors read the imports
under TYPE_CHECKING, which a test holds equal to the table.
"""

from typing import TYPE_CHECKING

from . import _bridge  # noqa: F401  first: makes fastpeft.kernels importable from a checkout

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import integrations as integrations
    from . import methods as methods
    from . import nn as nn
    from . import ops as ops
    from . import reference as reference
    from . import serving as serving
    from . import testing as testing
    from .integrations.models import accelerate as accelerate
    from .integrations.models import report as report
    from .integrations.models import restore as restore
    from .integrations.peft import register as register
    from .methods.attach import attach as attach
    from .methods.attach import delete_adapter as delete_adapter
    from .methods.attach import detach as detach
    from .methods.bottleneck.config import Bottleneck as Bottleneck
    from .methods.checkpoint import load as load
    from .methods.checkpoint import save as save
    from .methods.lora.config import Lora as Lora
    from .methods.lora.experts import expert_parameters as expert_parameters
    from .methods.per_row import per_row as per_row
    from .methods.prefix.config import PrefixTuning as PrefixTuning
    from .methods.prompt.config import PromptTuning as PromptTuning
    from .methods.selective.config import Selective as Selective
    from .methods.selective.lisa import LisaSchedule as LisaSchedule
    from .methods.selective.selection import Selection as Selection
    from .methods.selective.selection import load_selective as load_selective
    from .methods.selective.selection import select as select
    from .methods.serving_bits import serving_bits as serving_bits
    from .methods.switch import active_adapters as active_adapters
    from .methods.switch import disable_adapter as disable_adapter
    from .methods.switch import merge as merge
    from .methods.switch import set_adapter as set_adapter
    from .methods.switch import unmerge as unmerge
    from .nn.dequantisers import register_dequantiser as register_dequantiser
    from .ops import explain as explain

_MODULES = ("integrations", "methods", "nn", "ops", "reference", "serving", "testing")
_HOME = {
    "Bottleneck": "methods.bottleneck.config",
    "LisaSchedule": "methods.selective.lisa",
    "Lora": "methods.lora.config",
    "PrefixTuning": "methods.prefix.config",
    "PromptTuning": "methods.prompt.config",
    "Selection": "methods.selective.selection",
    "Selective": "methods.selective.config",
    "accelerate": "integrations.models",
    "active_adapters": "methods.switch",
    "attach": "methods.attach",
    "delete_adapter": "methods.attach",
    "detach": "methods.attach",
    "disable_adapter": "methods.switch",
    "expert_parameters": "methods.lora.experts",
    "explain": "ops",
    "load": "methods.checkpoint",
    "load_selective": "methods.selective.selection",
    "merge": "methods.switch",
    "per_row": "methods.per_row",
    "register": "integrations.peft",
    "register_dequantiser": "nn.dequantisers",
    "report": "integrations.models",
    "restore": "integrations.models",
    "save": "methods.checkpoint",
    "select": "methods.selective.selection",
    "serving_bits": "methods.serving_bits",
    "set_adapter": "methods.switch",
    "unmerge": "methods.switch",
}

__all__ = [*_MODULES, *_HOME]  # pyright: ignore[reportUnsupportedDunderAll]

if not TYPE_CHECKING:  # a checker that saw this would take every misspelt name for a value of any type

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
