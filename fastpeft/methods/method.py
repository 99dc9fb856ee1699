"""What every way of adapting a model can do, so that ``attach`` and its siblings drive any of them, alone or together.

A method is one object, the same for all models: a subclass of ``Method`` listed in ``registry.METHODS``. What it did to
a model it notes in ``record(model)``, a value of its own kind, and nowhere else, so that models can be copied and
pickled. An adapter name stands for one config of each of some methods. The order of calls in an ``attach``:

1. ``disable`` of every method in use, and ``resolve`` of every config: finds and checks everything, raises whatever can
   be wrong, touches nothing.
2. ``lift`` of every method in use, disabled, then ``apply`` of every plan: adds what belongs to the name, frozen and
   inactive.
   The model's own parameters are frozen by then, and the name's config is among ``configs(model)``. If anything raises
   from here on, ``discard`` is called on the methods that have a record, and leaves the model as it was.
3. ``settle`` of every method in use: modules may have been replaced by others' wrappers since.
   ``originals`` is where it is done, for whoever takes adapters off too.
4. ``set_active``, if the adapter is the model's first, and whenever the user calls ``set_adapter``.

``model`` is always the module that was attached to. Paths and names of parameters are those of the model as it was
before (``targets.walk``, ``attachment.original_names``); what modules tell about themselves is declared in
``nn.protocol``.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from .attachment import attachment_of
from .claims import Claims
from .layer_report import LayerReport


class Method(ABC):
    """One way of adapting: how its config becomes a change of a model, and the reverse.

    Attributes:
        name: a word: the key of its record, its folder in a checkpoint of several methods.
        config: the class of its configs.
        title: what messages call it.
        record_type: makes what it notes on a model that it was not used on before.
        files: its adapters on disk.
        unmergeable: why its adapters cannot be added to frozen weights, unless it is ``Mergeable``.
    """

    name: ClassVar[str]
    config: ClassVar[type]
    title: ClassVar[str]
    record_type: ClassVar[type]
    files: "Files"
    unmergeable: ClassVar[str] = ""

    def record(self, model: nn.Module) -> Any:
        """What it noted on this model, or None."""
        state = attachment_of(model)
        return None if state is None else state.records.get(self.name)

    def configs(self, model: nn.Module) -> dict[str, Any]:
        """Its configs on this model, by adapter name."""
        state = attachment_of(model)
        return {} if state is None else state.of(self.config)

    @abstractmethod
    def resolve(self, op: str, model: nn.Module, config: Any, name: str, strict: bool = True) -> Any:
        """A plan for ``apply``, of any kind.

        Args:
            op: The function to name in errors.
            model: The model, which is read and not changed.
            config: One of its configs.
            name: The adapter's.
            strict: Whether to refuse what a checkpoint's config may contain and a user's may not (names that match
                nothing).
        """

    def claims(self, model: nn.Module, plan: Any) -> Claims:
        """The names of the model's own weights that the plan trains, in place or as copies.

        No two adapters that act together may have one in common.

        Args:
            model: The model, as ``resolve`` was given it.
            plan: What ``resolve`` gave.
        """
        return frozenset()

    @abstractmethod
    def apply(self, model: nn.Module, plan: Any, name: str) -> None:
        """Add what has been resolved, inactive and frozen. ``record(model)`` and ``configs(model)[name]`` are there."""

    @abstractmethod
    def discard(self, model: nn.Module, name: str) -> None:
        """Take one inactive adapter off after ``lift``, also half an adapter that ``apply`` left when it raised."""

    @abstractmethod
    def remove(self, model: nn.Module, keep_merged: bool = False) -> None:
        """Take everything off after ``lift``: the modules, values and attributes that were there are there again.
        requires_grad is not its concern."""

    @abstractmethod
    def set_active(self, model: nn.Module, names: Sequence[str], trainable: bool = True) -> None:
        """Make these adapters act, in this order, and train unless told otherwise; the others neither."""

    @abstractmethod
    def disable(self, model: nn.Module) -> Callable[[], None]:
        """Have the model compute what it did before; returns what puts back the state it found. May be nested."""

    # What most methods have no need of.

    def lift(self, model: nn.Module) -> None:  # noqa: B027  it may be left as it is
        """Take off for a while what must not be there when modules are copied or replaced: hooks, and what is trained
        in the model's own parameters."""

    def settle(self, model: nn.Module) -> None:  # noqa: B027
        """Put it back, on the modules that now stand at the paths."""

    def check_active(self, op: str, model: nn.Module, names: Sequence[str]) -> None:  # noqa: B027
        """Raise if these cannot be active together; names of adapters without a part in this method are passed too."""

    def report(self, model: nn.Module) -> Sequence[LayerReport]:
        """Rows for what it did that no module reports itself (``nn.protocol.Reported``)."""
        return ()


class Mergeable(Method):
    """A method whose adapters are terms of frozen weights."""

    @abstractmethod
    def merged(self, model: nn.Module) -> bool:
        """Whether its adapters are in the frozen weights now."""

    @abstractmethod
    def prepare_merge(self, model: nn.Module, dequantise: bool = False) -> Callable[[], None] | None:
        """Raise whatever can be wrong; returns what merges its active adapters, or None if none is active.

        Args:
            model: What they are attached to.
            dequantise: Whether quantised layers become plain ones.
        """

    @abstractmethod
    def unmerge(self, model: nn.Module) -> None:
        """Take them out again, bit for bit."""


class Files(ABC):
    """A method's adapters on disk.

    Args:
        method: whose records and configs are read.
    """

    def __init__(self, method: Method):
        self.method = method

    @abstractmethod
    def recognises(self, fields: Mapping[str, Any]) -> bool:
        """Whether ``adapter_config.json`` with these fields is a checkpoint of this method."""

    @abstractmethod
    def read(self, op: str, model: nn.Module, directory: Path, fields: Mapping) -> tuple[Any, dict[str, Tensor]]:
        """Config and tensors, by the keys of ``parameters``, of a checkpoint that it recognises."""

    @abstractmethod
    def write(self, op: str, model: nn.Module, name: str, tensors: dict[str, Tensor], directory: Path) -> None:
        """Write one adapter. ``tensors`` are those of ``parameters``, whole and contiguous. ``formats.files`` has what
        puts files in place as a whole."""

    @abstractmethod
    def parameters(self, model: nn.Module, name: str) -> dict[str, Tensor]:
        """The adapter's own tensors, by the keys that ``read`` and ``write`` give them."""

    def expected(self, model: nn.Module, config: Any, plan: Any) -> dict[str, tuple[int, ...]] | None:
        """Keys and shapes of ``parameters`` after ``apply`` of this plan; None: only known once it has been applied."""
        return None

    def key(self, key: str) -> str:
        """A key of ``parameters`` as the files have it."""
        return key

    def ignores(self, key: str) -> bool:
        """Whether a tensor in a checkpoint may be there without a place in the model."""
        return False

    def must_be_float(self, key: str) -> bool:
        """Whether an integer tensor under this key of a checkpoint cannot be meant."""
        return True
