"""Which adapter is in which slot: least recently used adapters make room, leased and pinned ones stay.

The bank's lock is held around every call.
"""

from collections.abc import Sequence

import torch

from ..errors import BankFull
from .adapter import Adapter
from .device import Copies
from .sites import Site


class Slots:
    """``count`` slots of all layers; each holds one adapter or none."""

    def __init__(self, count: int, sites: Sequence[Site], max_rank: int):
        device = sites[0].device
        self.held: list[Adapter | None] = [None] * count
        self.tables_made = 0  # how often
        self.copies = Copies(device, count)
        self._sites, self._max_rank, self._clock = sites, max_rank, 0
        with torch.inference_mode(False):
            self._ranks = torch.zeros(len(sites), count, dtype=torch.int32, device=device)
            # The op takes float64 scales beside float64 adapters.
            sums = {torch.promote_types(site.dtype, torch.float32) for site in sites}
            self._scales = {dtype: torch.zeros(len(sites), count, dtype=dtype, device=device) for dtype in sums}
        for site in sites:
            scales = self._scales[torch.promote_types(site.dtype, torch.float32)]
            site.ranks, site.scales = self._ranks[site.index], scales[site.index]

    def make_tables(self, adapter: Adapter) -> list[Site]:
        """Allocate what the adapter's layers lack; returns those layers. All or none."""
        made = []
        self.tables_made += 1
        try:
            with self.copies.into(None):
                for site in adapter.sites:
                    if site.lora_a is None:
                        made.append(site)
                        site.make_tables(len(self.held), self._max_rank)
                for site in adapter.gains:
                    site.make_columns(site.gains, len(self.held))
                for site in adapter.biases:
                    site.make_columns(site.biases, len(self.held))
        except BaseException:
            self.drop_tables(made)
            raise
        return made

    def drop_tables(self, sites: Sequence[Site]) -> None:
        """Take back ``make_tables``."""
        self.tables_made += 1
        for site in sites:
            site.lora_a = site.lora_b = None

    def bring(self, op: str, wanted: Sequence[Adapter]) -> None:
        """Have every adapter in a slot, as the most recently used ones.

        Raises:
            BankFull: not enough slots can be freed; nothing has changed then.
        """
        absent = [adapter for adapter in wanted if adapter.slot is None]
        others = [a for a in self.held if a is not None and a not in wanted]
        free = [slot for slot, adapter in enumerate(self.held) if adapter is None]
        evictable = sorted((a for a in others if not a.pinned and not a.leases), key=lambda a: a.used)
        if len(absent) > len(free) + len(evictable):
            leased = sum(1 for a in others if a.leases)
            pinned = sum(1 for a in others if a.pinned and not a.leases)
            raise BankFull(
                f"{op}: {len(wanted)} different adapters need a slot, but of {len(self.held)} slots {leased} are in "
                f"use by running batches and {pinned} others are pinned"
            )
        for adapter in absent:
            adapter.read()  # which may fail
        for adapter in absent:
            slot = free.pop(0) if free else self.vacate(evictable.pop(0))
            self._copy(adapter, slot)
        for adapter in wanted:
            self._clock += 1
            adapter.used = self._clock

    def vacate(self, adapter: Adapter) -> int:
        """Take the adapter out of its slot, which is returned."""
        slot = adapter.in_slot()
        adapter.slot = adapter.ready = None
        self.held[slot] = None
        for site in adapter.sites:
            site.mask &= ~(1 << slot)
        return slot

    def _copy(self, adapter: Adapter, slot: int) -> None:
        with self.copies.into(slot):
            for site, (a, b) in adapter.read().items():
                site.write(slot, a, b)
            for site in self._sites:  # also where the adapter has nothing: a batch may have another there
                site.gains.write(slot, adapter.gains.get(site))
                site.biases.write(slot, adapter.biases.get(site))
            self._ranks[:, slot].copy_(adapter.ranks, non_blocking=True)
            for table in self._scales.values():
                table[:, slot].copy_(adapter.scales, non_blocking=True)
            adapter.ready = self.copies.copied()
        for site in adapter.sites:
            site.mask |= 1 << slot
        adapter.slot, self.held[slot] = slot, adapter
