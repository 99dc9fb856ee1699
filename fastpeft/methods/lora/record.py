"""What LoRA notes on a model."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

from torch import nn

from ...nn.lora import LoraLinear
from ...nn.trained_copy import TrainedCopy
from ..own import own_parameters
from ..selective.changes import Changes
from ..targets import Targets
from .config import Lora


@dataclass
class LoraRecord:
    """What LoRA did to a model.

    Attributes:
        linears: paths where a LoraLinear stands for the original.
        copies: paths where a TrainedCopy stands for the original.
        biases: the model's own that are trained, which act in place.
        attributes: (path, attribute, value) that were set to keep PyTorch from reading past the layers.
    """

    linears: list[str] = field(default_factory=list)
    copies: list[str] = field(default_factory=list)
    biases: Changes = field(default_factory=Changes)
    attributes: list[tuple[str, str, object]] = field(default_factory=list)

    def layers(self, model: nn.Module) -> dict[str, LoraLinear]:
        """The layers at ``linears``."""
        return {path: cast(LoraLinear, model.get_submodule(path)) for path in self.linears}

    def wrappers(self, model: nn.Module) -> dict[str, TrainedCopy]:
        """The wrappers at ``copies``."""
        return {path: cast(TrainedCopy, model.get_submodule(path)) for path in self.copies}


def bias_key(original: str, linears: Sequence[str]) -> str:
    """A bias in a checkpoint, by its name in the original model."""
    path = original.rpartition(".")[0]
    return f"{path}.base_layer.bias" if path in linears else original


def trained_biases(model: nn.Module, config: Lora, targets: Targets) -> list[str]:
    """Names of the model's own biases that an adapter trains: not those of modules that it copies."""
    copied, adapted = tuple(f"{path}." for path in targets.copies), {f"{path}.bias" for path in targets.linears}
    if config.bias == "none":
        return []
    names = [name for name in own_parameters(model) if name == "bias" or name.endswith(".bias")]
    return [name for name in names if not name.startswith(copied) and (config.bias == "all" or name in adapted)]
