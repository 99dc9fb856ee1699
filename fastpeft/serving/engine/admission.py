"""Which of the waiting requests begin now: adapters by turns, as far as rows, cache and slots reach.

An adapter of which nothing runs does not wait for the rows of those that have several: the youngest row of the one that
has most is put out for it, and goes on later.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

from ..bank.bank import AdapterBank
from ..errors import BankFull
from .request import Request
from .rows import Rows
from .turns import Turns


class Admission:
    """The bounds of one batcher.

    Args:
        bank: whose slots the requests' adapters need.
        rows: that have room for them, or not.
        max_rows: requests that run at once, and how often one that waits for a slot or room may be overtaken.
        adapter_rows: of one adapter.
        weights: of the adapters' turns.
    """

    def __init__(
        self,
        bank: AdapterBank,
        rows: Rows,
        max_rows: int,
        adapter_rows: int,
        weights: Mapping[str | None, float],
    ):
        self._bank, self._rows, self._max_rows, self._adapter_rows = bank, rows, max_rows, adapter_rows
        self._turns = Turns(weights)

    def admit(self, waiting: Sequence[Request]) -> tuple[list[Request], list[Request]]:
        """Those that begin now, each with a lease on its adapter, and the rows that are put out for them.

        One that cannot ever begin ends in error.

        Args:
            waiting: in the order in which they came.
        """
        running = self._rows.requests
        staying = list(running)
        admitted: list[Request] = []
        put_out: list[Request] = []
        blocked: Request | None = None  # the first that found no slot or no room
        full: BankFull | None = None
        no_room = False
        skipped: set[str | None] = set()
        for request in self._turns.order(waiting, skipped):
            held = Counter(other.adapter for other in staying)
            if held[request.adapter] >= self._adapter_rows or (no_room and held[request.adapter]):
                skipped.add(request.adapter)
                continue
            if blocked is not None and (
                blocked.overtaken >= self._max_rows or not (_has_slot(request, staying) or no_room)
            ):
                skipped.add(request.adapter)
                continue
            ways = self._ways(request, staying, admitted)
            if ways is None:
                no_room, blocked = True, blocked or request
                skipped.add(request.adapter)
                continue
            try:
                if request.lease is None and request.adapter is not None:
                    request.lease = self._bank._lease("submit", request.adapter)
            except BankFull as error:
                blocked, full = blocked or request, full or error
                skipped.add(request.adapter)
                continue
            except Exception as error:
                request.finish("error", error)
                continue
            if blocked is not None:
                blocked.overtaken += 1
            put_out += ways
            staying = [other for other in staying if other not in ways] + [request]
            admitted.append(request)
            self._turns.taken(request)
        if full is not None and blocked is not None and not admitted and not running:
            blocked.finish("error", full)  # nobody here will give a slot back
        return admitted, put_out

    def _ways(self, request: Request, staying: Sequence[Request], admitted: Sequence[Request]) -> list[Request] | None:
        """The rows that must go so that the request can begin, none if there is room; None if there can be none."""
        staying, ways = list(staying), []
        held = Counter(other.adapter for other in staying)
        while not (len(staying) < self._max_rows and self._rows.has_room(request, staying)):
            crowded, count = held.most_common(1)[0] if held else (None, 0)
            if held[request.adapter] or count < 2 or not hasattr(self._rows, "put_out"):
                return None
            victim = next(other for other in reversed(staying) if other.adapter == crowded)
            if victim in admitted:
                return None
            staying.remove(victim)
            held[crowded] -= 1
            ways.append(victim)
        return ways


def _has_slot(request: Request, others: Sequence[Request]) -> bool:
    return request.adapter is None or any(other.adapter == request.adapter for other in others)
