"""Selective fine-tuning among the other methods of ``attach``: several named selections, of which some act."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import nn

from ..method import Method
from .change import Change
from .config import Selective
from .files import SelectiveFiles
from .grad_entry import GradEntry
from .plan import Plan, resolve


@dataclass
class SelectiveRecord:
    """What was done to a model: a change for each adapter, and the hooks where gradients enter."""

    changes: dict[str, Change] = field(default_factory=dict)
    entry: GradEntry | None = None


class SelectiveMethod(Method):
    """The model's own parameters, trained in place; what is not active is kept in the CPU's memory."""

    name, config, title, record_type = "selective", Selective, "fastpeft.Selective", SelectiveRecord
    unmergeable = "it is in the model's own weights"

    def __init__(self):
        self.files = SelectiveFiles(self)

    def resolve(self, op: str, model: nn.Module, config: Selective, name: str, strict: bool = True) -> Plan:
        return resolve(op, model, config)

    def apply(self, model: nn.Module, plan: Plan, name: str) -> None:
        self.record(model).changes[name] = Change(model, plan)

    def discard(self, model: nn.Module, name: str) -> None:
        change = self.record(model).changes.pop(name, None)
        if change is not None and change.active:
            change.leave(model)

    def settle(self, model: nn.Module) -> None:
        record = self.record(model)
        if record.entry is not None:
            record.entry.remove()
        record.entry = GradEntry(model)

    def remove(self, model: nn.Module, keep_merged: bool = False) -> None:
        record = self.record(model)
        for name in list(record.changes):
            self.discard(model, name)
        if record.entry is not None:
            record.entry.remove()
            record.entry = None

    def check_active(self, op: str, model: nn.Module, names: Sequence[str]) -> None:
        changes = self.record(model).changes
        taken: dict[str, str] = {}
        for name in (name for name in names if name in changes):
            for weight in changes[name].weights():
                if weight in taken:
                    raise ValueError(f"{op}: {taken[weight]!r} and {name!r} both train {weight}, expected one of them")
                taken[weight] = name

    def set_active(self, model: nn.Module, names: Sequence[str], trainable: bool = True) -> None:
        changes = self.record(model).changes
        for name, change in changes.items():
            if change.active and name not in names:
                change.train(model, False)
                change.leave(model)
        for name in (name for name in names if name in changes):
            if not changes[name].active:
                changes[name].enter(model)
            changes[name].train(model, trainable)

    def disable(self, model: nn.Module) -> Callable[[], None]:
        acting = [change for change in self.record(model).changes.values() if change.active]
        trained = [[(t, t.requires_grad) for t in change.parameters(model).values()] for change in acting]
        for change in acting:
            change.leave(model)

        def put_back() -> None:
            for change, flags in zip(acting, trained, strict=True):
                change.enter(model)
                for tensor, flag in flags:
                    tensor.requires_grad_(flag)

        return put_back
