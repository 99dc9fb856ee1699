"""Which row of a batch has which adapter, for the methods that can tell rows apart."""

from collections.abc import Iterable, Sequence

from torch import nn

BASE = "__base__"  # PEFT's word for no adapter; here None says the same


class RowAdapters(nn.Module):
    """Trained parts that act on single rows: names of all, which are active, and what rows were promised.

    ``active`` serves every row of a batch for which no names are given; several of them follow one another.
    """

    fastpeft_added = True

    def __init__(self):
        super().__init__()
        self.active: tuple[str, ...] = ()
        self.rows: tuple[str | None, ...] | None = None
        self.disabled = False

    @property
    def names(self) -> tuple[str, ...]:
        raise NotImplementedError

    def take(self, op: str, model: nn.Module, given: dict) -> tuple[str | None, ...] | None:
        """Out of a call's arguments the adapters that it names for its rows; the last part to ask takes them away."""
        if "adapter_names" not in given:
            return None
        parts = [module for module in model.children() if isinstance(module, RowAdapters)]
        known = dict.fromkeys(name for part in parts for name in part.names)
        rows = given.pop("adapter_names") if parts[-1] is self else given["adapter_names"]
        if rows is None:
            return None
        rows = check_rows(op, "adapter_names", rows, known)
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


def check_rows(op: str, argument: str, rows: Sequence[str | None], known: Iterable[str]) -> tuple[str | None, ...]:
    """The rows' adapters, None for no adapter.

    Raises:
        TypeError, ValueError: no sequence of names, or an adapter that is not there.
    """
    if isinstance(rows, str) or not isinstance(rows, Sequence):
        raise TypeError(f"{op}: {argument} is {rows!r}, expected a name or None for each row of the batch")
    for name in rows:
        if name is not None and name != BASE and name not in known:
            names = ", ".join(map(repr, known))
            raise ValueError(f"{op}: {argument} holds {name!r}, expected None or one of {names}")
    return tuple(None if name == BASE else name for name in rows)
