"""Thin modules: parameters, initialisation, state dict. Their forward is one call into ops."""

from .adapter import LoraAdapter
from .bottleneck import BottleneckAdapter
from .branch import Branch
from .lora import LoraLinear
from .sharing import SharedInput, share_inputs, unshare_inputs
from .trained_copy import TrainedCopy

__all__ = [
    "BottleneckAdapter",
    "Branch",
    "LoraAdapter",
    "LoraLinear",
    "SharedInput",
    "TrainedCopy",
    "share_inputs",
    "unshare_inputs",
]
