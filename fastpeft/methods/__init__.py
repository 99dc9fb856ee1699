"""What a user attaches to a model: one config and the functions that act on the model with it."""

from .attach import attach, detach
from .bottleneck import Bottleneck
from .checkpoint import adapter_state_dict, load, save
from .lisa import LisaSchedule
from .lora import Lora
from .per_row import per_row
from .prefix import PrefixTuning
from .prompt import PromptTuning
from .report import LayerReport, Report, report
from .selection import Selection, select
from .selective import Selective
from .selective_files import load_selective
from .switch import disable_adapter, merge, set_adapter, unmerge

__all__ = [
    "Bottleneck",
    "LayerReport",
    "LisaSchedule",
    "Lora",
    "PrefixTuning",
    "PromptTuning",
    "Report",
    "Selection",
    "Selective",
    "adapter_state_dict",
    "attach",
    "detach",
    "disable_adapter",
    "load",
    "load_selective",
    "merge",
    "per_row",
    "report",
    "save",
    "select",
    "set_adapter",
    "unmerge",
]
