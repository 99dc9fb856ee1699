"""What ``attach`` did to a model, noted on the model itself."""

from dataclasses import dataclass, field

from torch import Tensor, nn

from ..nn.lora import LoraLinear
from .lora import Lora

KEY = "fastpeft_attachment"


@dataclass
class Attachment:
    """What was done to a model.

    Attributes:
        configs: by adapter name.
        active: names of the active adapters.
        linears, copies: paths where a LoraLinear or a TrainedCopy stands for the original.
        flags: requires_grad of every parameter of the original model, by name.
        biases: values that trained biases had, by their name in the original model.
        attributes: (path, attribute, value) that were set to keep PyTorch from reading past the layers.
    """

    configs: dict[str, Lora] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    linears: list[str] = field(default_factory=list)
    copies: list[str] = field(default_factory=list)
    flags: dict[str, bool] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    attributes: list[tuple[str, str, object]] = field(default_factory=list)


def attachment_of(model: nn.Module) -> Attachment | None:
    """What was attached to exactly this module, or None."""
    return model.__dict__.get(KEY)


def holder_of(op: str, model: nn.Module) -> tuple[nn.Module, Attachment]:
    """The module that was attached to: ``model``, or the one inside a wrapper (of DDP, of torch.compile)."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model is {type(model).__name__}, expected a torch.nn.Module")
    holders = [module for module in model.modules() if attachment_of(module) is not None]
    if not holders:
        raise ValueError(f"{op}: nothing is attached to this {type(model).__name__}")
    if len(holders) > 1 and holders[0] is not model:
        raise ValueError(
            f"{op}: {len(holders)} parts of this {type(model).__name__} have adapters, expected one of them"
        )
    return holders[0], attachment_of(holders[0])


def layers_of(model: nn.Module, state: Attachment) -> list[LoraLinear]:
    return [model.get_submodule(path) for path in state.linears]


def original_names(model: nn.Module, state: Attachment) -> dict[str, nn.Parameter]:
    """Parameters of the original model by the names they had in it."""
    names = {}
    for name, parameter in model.named_parameters():
        for part in (".base_layer.", ".original_module."):
            head, found, tail = name.partition(part)
            if found and head in (state.linears if part == ".base_layer." else state.copies):
                name = f"{head}.{tail}"
        names[name] = parameter
    return names


def refuse_merged(op: str, model: nn.Module, state: Attachment) -> None:
    if any(layer.merged for layer in layers_of(model, state)):
        raise ValueError(f"{op}: the adapters are merged; unmerge them first")
