"""Which row of a batch has which adapter, for the methods that can tell rows apart."""

from collections.abc import Collection, Sequence
from typing import Any, ClassVar, Protocol

from torch import nn

from .. import _check

BASE = "__base__"  # PEFT's word for no adapter; here None says the same


class Called(Protocol):
    """The one of a model's modules that a call goes to.

    Attributes:
        module: the module, which takes tokens.
        arguments: the names of its forward's arguments.
    """

    module: nn.Module
    arguments: tuple[str, ...]


class RowAdapters(nn.Module):
    """Trained parts that act on single rows, what they do to a model's call, and what rows were promised.

    Attributes:
        op: what messages call it.
        order: of several, the lower changes a call first.
        active: names of the adapters that serve every row of a batch for which no names are given; several of them
            follow one another.
        rows: names, or None, for the rows of every batch that does not name its own; None where ``active`` serves all.
        disabled: whether no row has an adapter.
    """

    fastpeft_added = True
    op: ClassVar[str]
    order: ClassVar[int]

    def __init__(self):
        super().__init__()
        self.active: tuple[str, ...] = ()
        self.rows: tuple[str | None, ...] | None = None
        self.disabled = False

    @property
    def parts(self) -> nn.ModuleDict | nn.ParameterDict:
        """What is trained, by the adapters' names."""
        raise NotImplementedError

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.parts)

    def set_active(self, names: Sequence[str], trainable: bool = True) -> None:
        """Of these names the ones that are here act, in their order, and train unless told otherwise."""
        self.active = tuple(name for name in names if name in self.parts)
        for name, part in self.parts.items():
            part.requires_grad_(trainable and name in self.active)

    def put(self, name: str, part: nn.Module | nn.Parameter) -> None:
        """Add an adapter, or replace it."""
        self.parts[name] = part  # type: ignore[assignment]  # which kind of part, the subclass knows

    def drop(self, name: str) -> None:
        """Let an adapter go, if it is here."""
        if name in self.parts:
            del self.parts[name]
        self.active = tuple(other for other in self.active if other != name)

    def before(self, called: Called, given: dict, rows: Sequence[str | None] | None) -> dict:
        """The arguments of a call with this in them.

        Args:
            called: Where the call goes.
            given: Its arguments by name.
            rows: The adapters that the call names for its rows, of any method.
        """
        raise NotImplementedError

    def announce(self, given: dict, rows: Sequence[str | None] | None) -> dict:
        """The arguments of an outer call, where a module inside does the work."""
        return given

    def after(self, called: Called, given: dict, output: Any) -> None:  # it may be left as it is
        """Look at what came of the call that ``before`` made these arguments for."""

    def members(self, rows: Sequence[str | None] | None, batch: int) -> list[tuple[str, ...]]:
        """For each row of a batch the adapters of this method that act on it, in their order.

        A batch may hold every row several times, one after another, as beam search makes it.
        """
        rows = self.rows if rows is None else rows
        if self.disabled:
            return [()] * batch
        if rows is None:
            return [self.active] * batch
        if not rows or batch % len(rows):
            raise ValueError(f"{self.op}: adapter_names has {len(rows)} items, expected one for each of {batch} rows")
        return [(name,) if name in self.names else () for name in rows for _ in range(batch // len(rows))]


def first_position(model: nn.Module) -> int:
    """The number of a row's first token: 0, or, as RoBERTa counts, what follows that of its padding token."""
    found: list[Any] = [m for m in model.modules() if hasattr(m, "create_position_ids_from_inputs_embeds")]
    return int(found[0].padding_idx) + 1 if found else 0


def check_rows(op: str, rows: object, known: Collection[str]) -> tuple[str | None, ...]:
    """The adapters of ``adapter_names``, None for no adapter.

    Raises:
        TypeError: It is no sequence of names.
        ValueError: It holds an adapter that is not there.
    """
    if isinstance(rows, str) or not isinstance(rows, Sequence):
        given = _check.shown(rows)
        raise TypeError(f"{op}: adapter_names is {given}, expected a name or None for each row of the batch")
    for name in rows:
        if name is not None and name != BASE and name not in known:
            names = ", ".join(map(repr, known))
            raise ValueError(f"{op}: adapter_names holds {name!r}, expected None or one of {names}")
    return tuple(None if name == BASE else name for name in rows)
