"""Methods whose adapters may differ from row to row of a batch: one module of them, a child of the model."""

from collections.abc import Callable, Sequence
from typing import ClassVar, cast

from torch import nn

from ..nn.entry import close_entries, open_entries, parts_of
from ..nn.rows import RowAdapters
from .method import Method


class RowMethod(Method):
    """A method of this kind.

    Attributes:
        child: the name of the module that is added to the model.
    """

    record_type = dict
    child: ClassVar[str]

    def present(self, model: nn.Module) -> bool:
        """Whether the model has such a child."""
        return getattr(model, self.child, None) is not None

    def adapters(self, model: nn.Module) -> RowAdapters:
        """The module with all adapters, which the first one brings."""
        return cast(RowAdapters, getattr(model, self.child))

    def refuse_own(self, op: str, model: nn.Module) -> None:
        """Raise if the model has a child of that name which is not ours."""
        if self.present(model) and self.record(model) is None:
            raise ValueError(f"{op}: the model has a {self.child} of its own, expected a model without")

    def put_up(self, model: nn.Module, adapters: RowAdapters) -> None:
        """Give the model the module of adapters, and the entries that call it."""
        adapters.train(model.training)
        open_entries(model)
        model.add_module(self.child, adapters)

    def discard(self, model: nn.Module, name: str) -> None:
        if self.present(model):
            self.adapters(model).drop(name)
            if not self.adapters(model).names:
                self.remove(model)

    def remove(self, model: nn.Module, keep_merged: bool = False) -> None:
        if self.present(model):
            delattr(model, self.child)
            if not parts_of(model):
                close_entries(model)

    def set_active(self, model: nn.Module, names: Sequence[str], trainable: bool = True) -> None:
        self.adapters(model).set_active(names, trainable)

    def disable(self, model: nn.Module) -> Callable[[], None]:
        adapters = self.adapters(model)
        before, adapters.disabled = adapters.disabled, True

        def enable() -> None:
            adapters.disabled = before

        return enable
