"""What LoRA notes on a model, and the biases of the model's own that it trains."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from ...nn.lora import LoraLinear
from ...nn.trained_copy import TrainedCopy
from ..attachment import original_names, state_of
from .config import Lora


@dataclass
class LoraRecord:
    """What LoRA did to a model.

    Attributes:
        linears: paths where a LoraLinear stands for the original.
        copies: paths where a TrainedCopy stands for the original.
        biases: values that trained biases had, by their name in the original model.
        trained: values of trained biases while those they had are in the model.
        attributes: (path, attribute, value) that were set to keep PyTorch from reading past the layers.
    """

    linears: list[str] = field(default_factory=list)
    copies: list[str] = field(default_factory=list)
    biases: dict[str, Tensor] = field(default_factory=dict)
    trained: dict[str, Tensor] | None = None
    attributes: list[tuple[str, str, object]] = field(default_factory=list)

    def layers(self, model: nn.Module) -> dict[str, LoraLinear]:
        """The layers at ``linears``."""
        return {path: cast(LoraLinear, model.get_submodule(path)) for path in self.linears}

    def wrappers(self, model: nn.Module) -> dict[str, TrainedCopy]:
        """The wrappers at ``copies``."""
        return {path: cast(TrainedCopy, model.get_submodule(path)) for path in self.copies}


def is_bias(name: str) -> bool:
    return name == "bias" or name.endswith(".bias")


def bias_key(original: str, linears: Sequence[str]) -> str:
    path = original.rpartition(".")[0]
    return f"{path}.base_layer.bias" if path in linears else original


def note_biases(model: nn.Module, record: LoraRecord, config: Lora) -> None:
    """The biases that this config trains keep the values that they have now."""
    if config.bias == "none":
        return
    state = state_of(model)
    adapted = {f"{path}.bias" for path in record.linears}
    for name, parameter in original_names(model, state).items():
        if name not in state.flags or not is_bias(name):
            continue
        if any(name.startswith(f"{path}.") for path in record.copies):
            continue
        if config.bias == "all" or name in adapted:
            record.biases[name] = parameter.data.clone()


def switch_biases(model: nn.Module, record: LoraRecord, trained: bool) -> None:
    """Have the trained biases' values in the model, or those from before."""
    if not record.biases or trained == (record.trained is None):
        return
    names = original_names(model, state_of(model))
    values = record.biases if record.trained is None else record.trained
    record.trained = None if trained else {name: names[name].data for name in record.biases}
    with torch.no_grad():
        for name, value in values.items():
            names[name].data = value
