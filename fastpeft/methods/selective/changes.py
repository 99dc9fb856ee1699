"""The changes of several adapters to one model's own parameters, and which of them are in the model."""

from collections.abc import Callable, Sequence

from torch import nn

from .change import Change


class Changes:
    """Changes by the adapters' names. Those that are wanted are in the model unless they are lifted or disabled.

    What is out for a while keeps its gradients, and comes back bit for bit.
    """

    def __init__(self):
        self.of: dict[str, Change] = {}
        self.wanted: tuple[str, ...] = ()
        self.lifted = False
        self.disabled = 0  # how often
        self._away: set[str] = set()  # those that are out for a while, and nothing else was in since

    def set_active(self, model: nn.Module, names: Sequence[str], trainable: bool = True) -> None:
        """Of these adapters the changes, and no others, are wanted in the model, and train unless told otherwise."""
        wanted = tuple(name for name in names if name in self.of)
        for name in self.wanted:
            if name not in wanted:
                self.of[name].rest(model)
        self.wanted = wanted
        self._away &= {*wanted}
        self._sync(model)
        for name in wanted:
            self.of[name].train(model, trainable)

    def lift(self, model: nn.Module) -> None:
        """Take all out until ``settle``."""
        self.lifted = True
        self._sync(model)

    def settle(self, model: nn.Module) -> None:
        """Put back what ``lift`` took out."""
        self.lifted = False
        self._sync(model)

    def disable(self, model: nn.Module) -> Callable[[], None]:
        """Take all out; returns what puts them back. May be nested."""
        self.disabled += 1
        self._sync(model)

        def enable() -> None:
            self.disabled -= 1
            self._sync(model)

        return enable

    def drop(self, model: nn.Module, name: str) -> None:
        """Let a change go, if there is one of this name."""
        if name in self.of:
            if name in self.wanted:
                self.set_active(model, [other for other in self.wanted if other != name])
            del self.of[name]

    def _sync(self, model: nn.Module) -> None:
        acting = () if self.lifted or self.disabled else self.wanted
        for name, change in self.of.items():
            if change.active and name not in acting:
                change.leave(model, for_a_while=name in self.wanted)
                self._away |= {name} & {*self.wanted}
        for name in acting:
            if not self.of[name].active:
                self.of[name].enter(model, again=name in self._away)
                self._away.discard(name)
