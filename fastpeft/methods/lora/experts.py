"""Experts in a model that is attached to: parameters of three dimensions, out of reach of LoRA on linear layers."""

from torch import nn

from ..layer_report import LayerReport
from ..targets import walk

_FROZEN = (
    "parameters of three dimensions, which attach leaves frozen; for LoRA on them use PEFT's target_parameters "
    "and fastpeft.accelerate"
)


def frozen_experts(model: nn.Module) -> list[LayerReport]:
    """A row for each experts module of the model: a module that has weights ``[experts, ..., ...]``."""
    return [LayerReport(path, _FROZEN, None, kind="experts") for path, module in walk(model) if _has_experts(module)]


def _has_experts(module: nn.Module) -> bool:
    shapes = [parameter.shape for parameter in module._parameters.values() if parameter is not None]
    stacks = [shape for shape in shapes if len(shape) == 3]
    return len(stacks) > 1 and all(shape[0] == stacks[0][0] == getattr(module, "num_experts", None) for shape in stacks)
