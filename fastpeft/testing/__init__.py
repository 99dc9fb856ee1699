"""Instruments that prove a fused op right; our own tests, benchmarks and ``fastpeft check`` are made of them.

The rule of accuracy: against float64, the largest error of the fused op is at most 2 times, and its root mean square
error at most 1.2 times, that of the same computation in plain PyTorch at the same dtype. Both are needed: a single bad
column hides in the rms, a global error of scale hides in the maximum.
"""

from collections.abc import Iterator

import torch

from . import bottleneck, dora_linear, dora_mlp, experts, lora_linear, lora_mlp, multi_lora, prompt_gather, row_linear
from .accuracy import MAX_RATIO, RMS_RATIO, Ratios, assert_no_worse, error_vs_eager, integer_inputs
from .bottleneck import BottleneckProblem, eager_bottleneck
from .dora_linear import DoraProblem, eager_dora_linear
from .dora_mlp import DoraMlpProblem, eager_dora_mlp
from .experts import ExpertsProblem, eager_experts
from .lora_linear import LoraProblem, eager_lora_linear
from .lora_mlp import MlpProblem, eager_lora_mlp
from .memory import guarded, poisoned
from .multi_lora import MultiLoraProblem, eager_multi_lora
from .prompt_gather import PromptProblem, eager_prompt_gather
from .row_linear import RowProblem, eager_row_linear

__all__ = [
    "MAX_RATIO",
    "RMS_RATIO",
    "BottleneckProblem",
    "DoraMlpProblem",
    "DoraProblem",
    "ExpertsProblem",
    "LoraProblem",
    "MlpProblem",
    "MultiLoraProblem",
    "PromptProblem",
    "Ratios",
    "RowProblem",
    "assert_no_worse",
    "check_ops",
    "eager_bottleneck",
    "eager_dora_linear",
    "eager_dora_mlp",
    "eager_experts",
    "eager_lora_linear",
    "eager_lora_mlp",
    "eager_multi_lora",
    "eager_prompt_gather",
    "eager_row_linear",
    "error_vs_eager",
    "guarded",
    "integer_inputs",
    "poisoned",
]

_OPS = bottleneck, dora_linear, dora_mlp, experts, lora_linear, lora_mlp, multi_lora, prompt_gather, row_linear


def check_ops(device: torch.device | str) -> Iterator[tuple[str, torch.dtype, float, float, bool]]:
    """Run every op forward and backward on ``device``, on each backend that serves it, random values at all dtypes.

    Yields (name, dtype, worst max ratio, worst rms ratio, ok), the ratios over all outputs and gradients.

    Args:
        device: where the ops run.
    """
    for op in _OPS:
        for name, dtype, worst in op.check(device):
            yield name, dtype, *worst, worst.ok
