"""The mathematics of every op in plain PyTorch: any float dtype, differentiable, imports torch only. The definition."""

from .bottleneck import bottleneck
from .dequantise import dequantise
from .dora_linear import dora_linear
from .dora_mlp import dora_mlp
from .dropout import inverse_keep, keep_mask
from .experts import ExpertLinear, experts
from .lora_embedding import lora_embedding
from .lora_linear import lora_linear
from .lora_mlp import lora_mlp
from .multi_lora import Slots, multi_lora
from .prompt_gather import prompt_gather
from .routing import Routing
from .row_linear import row_linear

__all__ = [
    "ExpertLinear",
    "Routing",
    "Slots",
    "bottleneck",
    "dequantise",
    "dora_linear",
    "dora_mlp",
    "experts",
    "inverse_keep",
    "keep_mask",
    "lora_embedding",
    "lora_linear",
    "lora_mlp",
    "multi_lora",
    "prompt_gather",
    "row_linear",
]
