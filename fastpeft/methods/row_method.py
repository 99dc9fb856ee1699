"""Methods whose adapters may differ from row to row of a batch: one module of them, a child of the model, has hooks."""

from collections.abc import Callable, Sequence
from typing import ClassVar

from torch import nn

from ..nn.rows import RowAdapters
from .method import Method


class RowMethod(Method):
    """A method of this kind.

    Attributes:
        child: the name of the module that is added to the model.
    """

    record_type = dict
    child: ClassVar[str]

    def adapters(self, model: nn.Module) -> RowAdapters | None:
        """The module with all adapters, or None before the first."""
        return getattr(model, self.child, None)

    def refuse_own(self, op: str, model: nn.Module) -> None:
        """Raise if the model has a child of that name which is not ours."""
        if self.adapters(model) is not None and self.record(model) is None:
            raise ValueError(f"{op}: the model has a {self.child} of its own, expected a model without")

    def put_up(self, model: nn.Module, adapters: RowAdapters) -> RowAdapters:
        """Hook the module of adapters into the model."""
        adapters.train(model.training)
        adapters.attach(model)
        model.add_module(self.child, adapters)
        return adapters

    def discard(self, model: nn.Module, name: str) -> None:
        adapters = self.adapters(model)
        if adapters is not None:
            adapters.drop(name)
            if not adapters.names:
                self.remove(model)

    def remove(self, model: nn.Module, keep_merged: bool = False) -> None:
        adapters = self.adapters(model)
        if adapters is not None:
            adapters.detach()
            delattr(model, self.child)

    def set_active(self, model: nn.Module, names: Sequence[str], trainable: bool = True) -> None:
        getattr(model, self.child).set_active(names, trainable)

    def disable(self, model: nn.Module) -> Callable[[], None]:
        adapters: RowAdapters = getattr(model, self.child)
        before, adapters.disabled = adapters.disabled, True

        def enable() -> None:
            adapters.disabled = before

        return enable
