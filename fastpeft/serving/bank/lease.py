"""A hold on an adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .adapter import Adapter

if TYPE_CHECKING:
    from .bank import AdapterBank


class Lease:
    """A hold on one adapter as it was when it was leased: it stays in its slot until ``release``."""

    def __init__(self, bank: AdapterBank, adapter: Adapter):
        self._bank, self.adapter = bank, adapter

    @property
    def name(self) -> str:
        return self.adapter.name

    def held(self, op: str, bank: AdapterBank) -> Adapter:
        """The adapter, if it is still held and the bank's."""
        if self._bank is not bank:
            raise ValueError(f"{op}: adapters has a lease on {self.name!r} that was released or is another bank's")
        return self.adapter

    def release(self) -> None:
        """Give it back; a second call does nothing."""
        bank, self._bank = self._bank, None
        if bank is not None:
            bank._release([self.adapter])
