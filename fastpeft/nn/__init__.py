"""Thin modules: parameters, initialisation, state dict. Their forward is one call into ops."""

from .adapter import LoraAdapter
from .bottleneck import BottleneckAdapter
from .branch import Branch
from .lora import LoraLinear
from .lora_experts import LoraExperts
from .lora_mlp import LoraMlp, fuse_mlps, unfuse_mlps
from .row_sparse import RowSparseLinear
from .sharing import SharedInput, share_inputs, unshare_inputs
from .token_rows import TokenRows
from .trained_copy import TrainedCopy

__all__ = [
    "BottleneckAdapter",
    "Branch",
    "LoraAdapter",
    "LoraExperts",
    "LoraLinear",
    "LoraMlp",
    "RowSparseLinear",
    "SharedInput",
    "TokenRows",
    "TrainedCopy",
    "fuse_mlps",
    "share_inputs",
    "unfuse_mlps",
    "unshare_inputs",
]
