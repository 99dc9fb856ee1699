"""The one rule of everything that acts in place: the original is read with all of it lifted.

What adapters train in the model's own parameters, the modules that stand in the place of its own, the biases that were
added, the values that a checkpoint carried and the hooks: while they are there, the model is not the one that was
attached to. So whoever finds out what a config means does so inside ``disabled``, and whoever copies or replaces
modules, or has an adapter start from the model's values, inside ``lifted``. Afterwards every value, gradient and
version counter is what it was.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from .attachment import attachment_of
from .carried import lift_carried
from .registry import methods_of


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside the block the model has its own modules, parameters and values, and computes what it did with them."""
    state = attachment_of(model)
    with ExitStack() as stack:
        for method in methods_of(state) if state is not None else ():
            stack.callback(method.disable(model))
        if state is not None:
            stack.callback(lift_carried(model, state))  # last, so that it lies under what the methods put back
        yield


@contextmanager
def lifted(model: nn.Module) -> Iterator[None]:
    """The same without the hooks, so that modules may be copied and replaced; methods may be added and taken off."""
    state = attachment_of(model)
    with disabled(model):
        for method in methods_of(state) if state is not None else ():
            method.lift(model)
        try:
            yield
        finally:
            for method in methods_of(state) if state is not None else ():
                method.settle(model)
