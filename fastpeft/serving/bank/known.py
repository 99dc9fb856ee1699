"""The adapters that a bank knows by name, and who holds them. Any thread may call; errors name the bank's method."""

import threading
from collections.abc import Sequence

from ..errors import BankError, BankFull, UnknownAdapter
from .adapter import Adapter
from .host_memory import trim
from .lease import Lease
from .slots import Slots

_SHOWN = 8  # names in an error


class Known:
    """What ``AdapterBank`` does with names, slots and leases, under one lock."""

    def __init__(self, slots: Slots, host_bytes: int | None):
        self._slots, self._host_bytes = slots, host_bytes
        self._lock = threading.RLock()
        self._by_name: dict[str, Adapter] = {}
        self._closed = False

    def add(self, op: str, adapter: Adapter, pin: bool) -> None:
        """Under a new name, or in place of the adapter of that name, whose pin it keeps. An error changes nothing."""
        with self._lock:
            self._open(op)
            old = self._by_name.get(adapter.name)
            pin = pin or (old is not None and old.pinned)
            made = self._slots.make_tables(adapter)
            if old is not None and old.slot is not None and not old.leases:
                self._slots.vacate(old)  # nobody holds it, so there is a slot for the new one
            try:
                if pin or None in self._slots.held:
                    self._slots.bring(op, [adapter])
            except BankFull:
                self._slots.drop_tables(made)
                raise
            adapter.pinned = pin
            self._by_name[adapter.name] = adapter
            if old is not None:
                self._retire(old)
            trim(self._by_name.values(), self._host_bytes)

    def remove(self, op: str, name: str) -> None:
        with self._lock:
            adapter = self._find(op, name)
            del self._by_name[name]
            self._retire(adapter)

    def pin(self, op: str, name: str) -> None:
        with self._lock:
            adapter = self._find(op, name)
            self._slots.bring(op, [adapter])
            adapter.pinned = True

    def unpin(self, op: str, name: str) -> None:
        with self._lock:
            self._find(op, name).pinned = False

    def names(self) -> list[str]:
        with self._lock:
            return list(self._by_name)

    def resident(self) -> list[str]:
        """Least recently used first."""
        with self._lock:
            return [a.name for a in sorted(self._by_name.values(), key=lambda a: a.used) if a.slot is not None]

    def version(self, op: str, name: str) -> int:
        with self._lock:
            return self._find(op, name).version

    def __contains__(self, name: object) -> bool:
        with self._lock:
            return name in self._by_name

    def acquire(self, op: str, wanted: Sequence[str | Lease], bank: object) -> list[Adapter]:
        """Adapters in slots, each with one lease more for each time that it is named; all or none."""
        with self._lock:
            self._open(op)
            adapters = [a.held(op, bank) if isinstance(a, Lease) else self._find(op, a) for a in wanted]
            self._slots.bring(op, list({id(a): a for a in adapters}.values()))
            for adapter in adapters:
                adapter.leases += 1
            trim(self._by_name.values(), self._host_bytes)
            return adapters

    def release(self, adapters: Sequence[Adapter]) -> None:
        with self._lock:
            for adapter in adapters:
                adapter.leases -= 1
                if adapter.retired:
                    self._retire(adapter)

    def close(self, op: str) -> bool:
        """Forget everything; False where that has been done. The device is then idle.

        Raises:
            BankError: a batch or a lease still holds an adapter.
        """
        with self._lock:
            if self._closed:
                return False
            held = [adapter for adapter in self._slots.held if adapter is not None]
            leased = [adapter.name for adapter in held if adapter.leases]
            if leased:
                raise BankError(f"{op}: adapters are in use: {', '.join(leased)}")
            self._slots.copies.synchronize()
            for adapter in held:
                self._slots.vacate(adapter)
            self._closed = True
            self._by_name.clear()
            return True

    def _open(self, op: str) -> None:
        if self._closed:
            raise BankError(f"{op}: the bank is closed")

    def _find(self, op: str, name: object) -> Adapter:
        self._open(op)
        if not isinstance(name, str) or name not in self._by_name:
            known = ", ".join(list(self._by_name)[:_SHOWN]) or "none"
            raise UnknownAdapter(f"{op}: no adapter {name!r}, expected one of those loaded: {known}")
        return self._by_name[name]

    def _retire(self, adapter: Adapter) -> None:
        adapter.retired, adapter.pinned = True, False
        if not adapter.leases and adapter.slot is not None:
            self._slots.vacate(adapter)
