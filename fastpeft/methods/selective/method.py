"""Selective fine-tuning among the other methods of ``attach``: several named selections, of which some act."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from ..method import Method
from . import files
from .change import Change
from .config import Selective
from .grad_entry import GradEntry
from .plan import Plan, resolve


@dataclass
class SelectiveRecord:
    """What was done to a model: a change for each adapter, and the hooks where gradients enter."""

    changes: dict[str, Change] = field(default_factory=dict)
    entry: GradEntry | None = None


class SelectiveMethod(Method):
    """The model's own parameters, trained in place; what is not active is kept in the CPU's memory."""

    name, config, title = "selective", Selective, "fastpeft.Selective"
    unmergeable = "it is in the model's own weights"

    def new_record(self) -> SelectiveRecord:
        return SelectiveRecord()

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
        changes, taken = self.record(model).changes, {}
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

    def parameters(self, model: nn.Module, name: str) -> dict[str, Tensor]:
        change = self.record(model).changes.get(name)
        return {} if change is None else change.parameters(model)

    def plan(self, model: nn.Module, name: str) -> Plan:
        """What the adapter trains."""
        return self.record(model).changes[name].plan

    def recognises(self, fields: Mapping) -> bool:
        return fields.get("peft_type") in (files.OWN, files.TOKENS, files.NORMS)

    def read(self, op: str, model: nn.Module, directory: Path, fields: Mapping) -> tuple[Selective, dict[str, Tensor]]:
        return files.read(op, model, directory, fields)

    def write(self, op: str, model: nn.Module, name: str, tensors: dict[str, Tensor], directory: Path) -> None:
        files.write(op, model, self.plan(model, name), tensors, directory)
