"""What ``attach`` did to a model, noted on the model itself."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .. import _check
from ..nn.protocol import original_child
from .claims import Claims

KEY = "fastpeft_attachment"


@dataclass
class Attachment:
    """What was done to a model.

    Attributes:
        configs: by adapter name; a tuple where an adapter has several.
        active: names of the active adapters.
        flags: requires_grad of every parameter of the original model, by name.
        claims: what each adapter trains of the original model.
        records: what each method noted, by the method's name.
        carried: by adapter name, values of the model's own parameters that its checkpoint brought (``carried``).
        replaced: the model's own values of those parameters, while others are in the model.
        arriving: adapters' values in a state dict that is being loaded (``pretrained``).
    """

    configs: dict[str, Any] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    flags: dict[str, bool] = field(default_factory=dict)
    claims: dict[str, Claims] = field(default_factory=dict)
    records: dict[str, Any] = field(default_factory=dict)
    carried: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    replaced: dict[str, Tensor] = field(default_factory=dict)
    arriving: dict[str, Tensor] = field(default_factory=dict)

    def of(self, kind: type) -> dict[str, Any]:
        """Configs of this class, by adapter name."""
        parts = ((name, part) for name in self.configs for part in self.parts(name))
        return {name: part for name, part in parts if type(part) is kind}

    def parts(self, name: str) -> tuple[Any, ...]:
        """The adapter's configs."""
        config = self.configs[name]
        return config if isinstance(config, tuple) else (config,)

    def check_known(self, op: str, name: object) -> None:
        """Raise if there is no adapter of this name."""
        if not isinstance(name, str) or name not in self.configs:
            given = repr(name) if isinstance(name, str) else _check.shown(name)
            raise ValueError(f"{op}: no adapter {given}, expected one of {', '.join(self.configs)}")

    @property
    def linears(self) -> list[str]:
        """Paths where a LoraLinear stands for the original."""
        return self.records["lora"].linears if "lora" in self.records else []

    @property
    def copies(self) -> list[str]:
        """Paths where a TrainedCopy stands for the original."""
        return self.records["lora"].copies if "lora" in self.records else []


def check_module(op: str, model: object) -> None:
    """Raise if ``model`` is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model is {type(model).__name__}, expected a torch.nn.Module")


def attachment_of(model: nn.Module) -> Attachment | None:
    """What was attached to exactly this module, or None."""
    return model.__dict__.get(KEY)


def state_of(model: nn.Module) -> Attachment:
    """What was attached to this module, which something was attached to."""
    return model.__dict__[KEY]


def holder_of(op: str, model: nn.Module) -> tuple[nn.Module, Attachment]:
    """The module that was attached to: ``model``, or the one inside a wrapper (of DDP, of torch.compile)."""
    check_module(op, model)
    holders = [(m, state) for m in model.modules() if (state := attachment_of(m)) is not None]
    if not holders:
        raise ValueError(f"{op}: nothing is attached to this {type(model).__name__}")
    if len(holders) > 1 and holders[0][0] is not model:
        raise ValueError(
            f"{op}: {len(holders)} parts of this {type(model).__name__} have adapters, expected one of them"
        )
    return holders[0]


def original_names(model: nn.Module, state: Attachment) -> dict[str, nn.Parameter]:
    """Parameters of the original model by the names they had in it; those that were added keep theirs."""
    wrappers = {path: child for path, module in model.named_modules() if (child := original_child(module)) is not None}
    return {original_name(name, wrappers): parameter for name, parameter in model.named_parameters()}


def original_name(name: str, wrappers: dict[str, str]) -> str:
    """The name that a parameter had before the modules at these paths stood for others, their children named here."""
    kept, path = [], ""
    for part in name.split("."):
        if wrappers.get(path) != part:
            kept.append(part)
        path = f"{path}.{part}" if path else part
    return ".".join(kept)


def owners(model: nn.Module) -> dict[int, list[str]]:
    """For the id of every parameter the names that it has: several where it is tied."""
    found: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), []).append(name)
    return found


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put ``module`` where ``path`` says."""
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
