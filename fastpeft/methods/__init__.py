"""What a user attaches to a model: one config and the functions that act on the model with it."""

from .attach import attach, detach
from .bottleneck import Bottleneck
from .checkpoint import adapter_state_dict, load, save
from .lora import Lora
from .per_row import per_row
from .prompt import PromptTuning
from .report import LayerReport, Report, report
from .switch import disable_adapter, merge, set_adapter, unmerge

__all__ = [
    "Bottleneck",
    "LayerReport",
    "Lora",
    "PromptTuning",
    "Report",
    "adapter_state_dict",
    "attach",
    "detach",
    "disable_adapter",
    "load",
    "merge",
    "per_row",
    "report",
    "save",
    "set_adapter",
    "unmerge",
]
