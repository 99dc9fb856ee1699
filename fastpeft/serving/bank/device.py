"""Copies into slots, and who waits for whom: on CUDA they run on a stream of their own, elsewhere in place.

A copy into a slot waits for the last batch that read it; a batch waits for the copies of its own adapters. Both waits
are on the device: no thread is held up.
"""

import contextlib
from collections.abc import Iterable, Iterator

import torch


class Copies:
    """The copy stream of one device, and the events of the batches that may still read a slot.

    Args:
        device: of the slots.
        slots: how many there are.
    """

    def __init__(self, device: torch.device, slots: int):
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._readers: list[dict[int, torch.cuda.Event]] = [{} for _ in range(slots)]

    @contextlib.contextmanager
    def into(self, slot: int | None) -> Iterator[None]:
        """Copies inside are ordered after everything that was still to read the slot; None: allocations."""
        # Tensors made in a caller's inference mode could not be written to outside of it.
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.stream(self._stream):
            if slot is not None:
                readers, self._readers[slot] = self._readers[slot], {}
                if self._stream is not None:
                    for event in readers.values():
                        self._stream.wait_event(event)
            yield

    def copied(self) -> torch.cuda.Event | None:
        """An event after the copies so far, or None where they are done when the call returns."""
        return None if self._stream is None else self._stream.record_event()

    def wait(self, event: torch.cuda.Event | None) -> None:
        """The current stream goes on after the event."""
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)

    def read(self, slots: Iterable[int]) -> None:
        """The current stream has been given its last work that reads the slots."""
        if self._stream is None:
            return
        stream = torch.cuda.current_stream(self._device)
        event = stream.record_event()
        for slot in slots:
            self._readers[slot][stream.cuda_stream] = event

    def synchronize(self) -> None:
        """Wait until the device is idle."""
        if self._stream is not None:
            torch.cuda.synchronize(self._device)
