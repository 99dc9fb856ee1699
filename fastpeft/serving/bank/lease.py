"""A hold on an adapter, and the names and holds that a batch's rows are given by."""

from collections.abc import Callable, Sequence

from ... import _check
from .adapter import Adapter


class Lease:
    """A hold on one adapter as it was when it was leased: it stays in its slot until ``release``.

    Made by ``AdapterBank.lease``, and taken by ``use`` and ``generate`` in place of the adapter's name.
    """

    def __init__(self, adapter: Adapter, bank: object, release: Callable[[Adapter], None]):
        self.adapter = adapter
        self._bank: object | None = bank
        self._give_back = release

    @property
    def name(self) -> str:
        """The name that the adapter had when it was leased."""
        return self.adapter.name

    @property
    def version(self) -> int:
        """Of the adapter, as ``AdapterBank.version`` told it when it was leased."""
        return self.adapter.version

    def held(self, op: str, bank: object) -> Adapter:
        """The adapter.

        Raises:
            ValueError: the lease was released, or another bank made it.
        """
        if self._bank is not bank:
            raise ValueError(f"{op}: adapter_names has a lease on {self.name!r} that was released or is another bank's")
        return self.adapter

    def release(self) -> None:
        """Give the adapter back; a second call does nothing."""
        bank, self._bank = self._bank, None
        if bank is not None:
            self._give_back(self.adapter)


def checked_rows(op: str, adapter_names: object, lengths: object = None) -> list[str | Lease | None]:
    """``adapter_names`` as a list.

    Raises:
        TypeError: no list of names, leases and None. ValueError: ``lengths`` is not one length of at least 0 for each.
    """
    if isinstance(adapter_names, str) or not isinstance(adapter_names, Sequence) or not adapter_names:
        given = _check.shown(adapter_names)
        raise TypeError(f"{op}: adapter_names is {given}, expected a list with a name or None for each row")
    for i, name in enumerate(adapter_names):
        if not (name is None or isinstance(name, str | Lease)):
            raise TypeError(f"{op}: adapter_names[{i}] is {_check.shown(name)}, expected a name, a lease or None")
    if lengths is not None:
        if not isinstance(lengths, Sequence) or len(lengths) != len(adapter_names):
            given = _check.shown(lengths)
            raise ValueError(f"{op}: lengths is {given}, expected a length for each of {len(adapter_names)} rows")
        for i, length in enumerate(lengths):
            if isinstance(length, bool) or not isinstance(length, int) or length < 0:
                raise ValueError(f"{op}: lengths[{i}] is {_check.shown(length)}, expected an integer of at least 0")
    return list(adapter_names)
