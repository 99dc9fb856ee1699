"""The mathematics of every op in plain PyTorch: any float dtype, differentiable, imports torch only. The definition."""

from .dropout import inverse_keep, keep_mask
from .lora_linear import lora_linear
from .multi_lora import Slots, multi_lora
from .routing import Routing

__all__ = ["Routing", "Slots", "inverse_keep", "keep_mask", "lora_linear", "multi_lora"]
