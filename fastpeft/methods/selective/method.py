"""Selective fine-tuning among the other methods of ``attach``: several named selections, of which some act."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import nn

from ..claims import Claims
from ..method import Method
from .change import Change
from .changes import Changes
from .config import Selective
from .files import SelectiveFiles
from .grad_entry import GradEntry
from .plan import Plan, resolve
from .selection import selection_of


@dataclass
class SelectiveRecord:
    """What was done to a model: a change for each adapter, and the hooks where gradients enter."""

    changes: Changes = field(default_factory=Changes)
    entry: GradEntry | None = None


class SelectiveMethod(Method):
    """The model's own parameters, trained in place; what is not active is kept in the CPU's memory."""

    name, config, title, record_type = "selective", Selective, "fastpeft.Selective", SelectiveRecord
    unmergeable = "it is in the model's own weights"

    def __init__(self):
        self.files = SelectiveFiles(self)

    def resolve(self, op: str, model: nn.Module, config: Selective, name: str, strict: bool = True) -> Plan:
        refuse_selection(op, model)
        return resolve(op, model, config)

    def claims(self, model: nn.Module, plan: Plan) -> Claims:
        return plan.claims()

    def apply(self, model: nn.Module, plan: Plan, name: str) -> None:
        self.record(model).changes.of[name] = Change(model, plan)

    def lift(self, model: nn.Module) -> None:
        record = self.record(model)
        record.changes.lift(model)
        if record.entry is not None:
            record.entry.remove()
            record.entry = None

    def settle(self, model: nn.Module) -> None:
        record = self.record(model)
        record.changes.settle(model)
        if record.entry is None:
            record.entry = GradEntry(model)

    def discard(self, model: nn.Module, name: str) -> None:
        self.record(model).changes.drop(model, name)

    def remove(self, model: nn.Module, keep_merged: bool = False) -> None:
        changes = self.record(model).changes
        for name in list(changes.of):
            changes.drop(model, name)

    def set_active(self, model: nn.Module, names: Sequence[str], trainable: bool = True) -> None:
        self.record(model).changes.set_active(model, names, trainable)

    def disable(self, model: nn.Module) -> Callable[[], None]:
        return self.record(model).changes.disable(model)


def refuse_selection(op: str, model: nn.Module) -> None:
    """Raise if ``select`` has put something into the model, or into a part of it, that is still there."""
    for path, module in model.named_modules():
        if selection_of(module) is not None:
            where = path or "the model"
            raise ValueError(f"{op}: {where} has a selection of fastpeft.select; revert it first")
