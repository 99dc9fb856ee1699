"""Which row of a batch has which adapter, for the methods that can tell rows apart."""

from collections.abc import Collection, Sequence

from torch import nn
from torch.utils.hooks import RemovableHandle

from .. import _check

BASE = "__base__"  # PEFT's word for no adapter; here None says the same


class RowAdapters(nn.Module):
    """Trained parts that act on single rows, the hooks that call them, and what rows were promised.

    Attributes:
        active: names of the adapters that serve every row of a batch for which no names are given; several of them
            follow one another.
        rows: names, or None, for the rows of every batch that does not name its own; None where ``active`` serves all.
        disabled: whether no row has an adapter.
    """

    fastpeft_added = True

    def __init__(self):
        super().__init__()
        self.active: tuple[str, ...] = ()
        self.rows: tuple[str | None, ...] | None = None
        self.disabled = False
        self.handles: list[RemovableHandle] = []

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

    def attach(self, model: nn.Module) -> None:
        """Hook into the model."""
        raise NotImplementedError

    def detach(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def take(self, op: str, model: nn.Module, given: dict) -> tuple[str | None, ...] | None:
        """Out of a call's arguments the adapters that it names for its rows; the last part to ask takes them away."""
        if "adapter_names" not in given:
            return None
        parts = [module for module in model.children() if isinstance(module, RowAdapters)]
        known = dict.fromkeys(name for part in parts for name in part.names)
        rows = given.pop("adapter_names") if parts[-1] is self else given["adapter_names"]
        if rows is None:
            return None
        rows = check_rows(op, rows, known)
        return tuple(name if name in self.names else None for name in rows)

    def members(self, op: str, rows: Sequence[str | None] | None, batch: int) -> list[tuple[str, ...]]:
        """For each row of a batch the adapters that act on it, in their order.

        A batch may hold every row several times, one after another, as beam search makes it.
        """
        rows = self.rows if rows is None else rows
        if self.disabled:
            return [()] * batch
        if rows is None:
            return [self.active] * batch
        if not rows or batch % len(rows):
            raise ValueError(f"{op}: adapter_names has {len(rows)} items, expected one for each of {batch} rows")
        return [() if name is None else (name,) for name in rows for _ in range(batch // len(rows))]


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
