"""Whose turn it is: adapters take turns, each as often as its weight says; within one, first come, first served.

The n-th turn of an adapter with weight w is due at time n / w of a clock that stands where the last turn was due. Who
comes anew begins at the clock, so nobody saves up turns and nobody waits for those who came in crowds.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence

from .request import Request


class Turns:
    """The order in which waiting requests are offered rows.

    Args:
        weights: by adapter's name, None for the bare model; 1 where it has none.
    """

    def __init__(self, weights: Mapping[str | None, float]):
        self._weights = dict(weights)
        self._due: dict[str | None, float] = {}
        self._clock = 0.0

    def order(self, waiting: Sequence[Request], skipped: set[str | None]) -> Iterator[Request]:
        """The requests that have not ended, by turns, as long as the caller asks.

        Args:
            waiting: in the order in which they came.
            skipped: adapters that are passed over, to which the caller may add.
        """
        queues: dict[str | None, deque[Request]] = {}
        for request in waiting:
            if not request.done:
                queues.setdefault(request.adapter, deque()).append(request)
        for adapter in self._due.keys() - queues.keys():
            if self._due[adapter] <= self._clock:
                del self._due[adapter]
        while queues:
            adapter = min(queues, key=lambda name: self._due.get(name, self._clock))
            queue = queues[adapter]
            if adapter not in skipped:
                yield queue.popleft()
            if adapter in skipped or not queue:
                del queues[adapter]

    def taken(self, request: Request) -> None:
        """The request has begun, by its adapter's turn.

        Args:
            request: one that ``order`` gave.
        """
        due = max(self._due.get(request.adapter, self._clock), self._clock)
        self._clock = due
        self._due[request.adapter] = due + 1.0 / self._weights.get(request.adapter, 1.0)
