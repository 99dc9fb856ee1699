"""What a user attaches to a model: one config and the functions that act on the model with it."""

from .attach import attach, delete_adapter, detach
from .bottleneck.config import Bottleneck
from .checkpoint import adapter_state_dict, load, save
from .lora.config import Lora
from .lora.experts import expert_parameters
from .per_row import per_row
from .prefix.config import PrefixTuning
from .prompt.config import PromptTuning
from .report import LayerReport, Report, report
from .selective.config import Selective
from .selective.lisa import LisaSchedule
from .selective.selection import Selection, load_selective, select
from .switch import active_adapters, disable_adapter, merge, set_adapter, unmerge

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
    "active_adapters",
    "adapter_state_dict",
    "attach",
    "delete_adapter",
    "detach",
    "disable_adapter",
    "expert_parameters",
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
