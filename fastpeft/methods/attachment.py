"""What ``attach`` did to a model, noted on the model itself."""

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..nn.lora import LoraLinear
from ..nn.trained_copy import TrainedCopy

KEY = "fastpeft_attachment"
_ORIGINALS = {LoraLinear: "base_layer", TrainedCopy: "original_module"}


@dataclass
class Attachment:
    """What was done to a model.

    Attributes:
        configs: by adapter name; a tuple where an adapter has several.
        active: names of the active adapters.
        flags: requires_grad of every parameter of the original model, by name.
        records: what each method noted, by the method's name.
    """

    configs: dict[str, Any] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    flags: dict[str, bool] = field(default_factory=dict)
    records: dict[str, Any] = field(default_factory=dict)

    def of(self, kind: type) -> dict[str, Any]:
        """Configs of this class, by adapter name."""
        parts = ((name, part) for name in self.configs for part in self.parts(name))
        return {name: part for name, part in parts if type(part) is kind}

    def parts(self, name: str) -> tuple[Any, ...]:
        """The adapter's configs."""
        config = self.configs[name]
        return config if isinstance(config, tuple) else (config,)

    @property
    def linears(self) -> list[str]:
        """Paths where a LoraLinear stands for the original."""
        return self.records["lora"].linears if "lora" in self.records else []

    @property
    def copies(self) -> list[str]:
        """Paths where a TrainedCopy stands for the original."""
        return self.records["lora"].copies if "lora" in self.records else []


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


def original_child(module: nn.Module) -> str | None:
    """Where a module that stands for another keeps it; None for a module that stands for itself."""
    return _ORIGINALS.get(type(module)) or getattr(type(module), "fastpeft_original", None)


def original_names(model: nn.Module, state: Attachment) -> dict[str, nn.Parameter]:
    """Parameters of the original model by the names they had in it; those that were added keep theirs."""
    wrappers = {path: original_child(module) for path, module in model.named_modules() if original_child(module)}
    return {_original_name(name, wrappers): parameter for name, parameter in model.named_parameters()}


def _original_name(name: str, wrappers: dict[str, str]) -> str:
    kept, path = [], ""
    for part in name.split("."):
        if wrappers.get(path) != part:
            kept.append(part)
        path = f"{path}.{part}" if path else part
    return ".".join(kept)


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put ``module`` where ``path`` says."""
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
