"""The mathematics of every op in plain PyTorch: any float dtype, differentiable, imports torch only. The definition."""

from .dropout import inverse_keep, keep_mask
from .lora_linear import lora_linear

__all__ = ["inverse_keep", "keep_mask", "lora_linear"]
