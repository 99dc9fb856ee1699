"""Which of the waiting requests begin now: first come, first served, as far as rows, cache and slots reach."""

from collections.abc import Sequence

from ..bank.bank import AdapterBank
from ..errors import BankFull
from .request import Request

_PREFILL_TOKENS = 4096  # padded prompt tokens that are read at once between two steps


class Admission:
    """The bounds of one batcher.

    Args:
        bank: whose slots the requests' adapters need.
        max_rows: requests that run at once, and how often one that waits for a slot may be overtaken.
        max_cached: rows times the longest of them, in tokens.
    """

    def __init__(self, bank: AdapterBank, max_rows: int, max_cached: int):
        self._bank, self._max_rows, self._max_cached = bank, max_rows, max_cached

    def admit(self, waiting: Sequence[Request], running: Sequence[Request]) -> list[Request]:
        """Those that begin now, each with a lease on its adapter. One that cannot ever begin ends in error.

        Args:
            waiting: in the order in which they came.
            running: that have rows.
        """
        admitted: list[Request] = []
        blocked: Request | None = None
        full: BankFull | None = None
        for request in waiting:
            if request.done:
                continue
            if not self._has_room(request, admitted, running):
                break
            if blocked is not None and (
                blocked.overtaken >= self._max_rows or not _needs_no_slot(request, (*running, *admitted))
            ):
                continue
            try:
                request.lease = None if request.adapter is None else self._bank._lease("submit", request.adapter)
            except BankFull as error:
                blocked, full = request, error
                continue
            except Exception as error:
                request.finish("error", error)
                continue
            if blocked is not None:
                blocked.overtaken += 1
            admitted.append(request)
        if blocked is not None and not admitted and not running:
            blocked.finish("error", full)  # nobody here will give a slot back
        return admitted

    def _has_room(self, request: Request, admitted: Sequence[Request], running: Sequence[Request]) -> bool:
        rows = [*running, *admitted, request]
        read = max(len(r.prompt) for r in (*admitted, request)) * (len(admitted) + 1)
        cached = max(len(r.prompt) + r.max_new_tokens for r in rows) * len(rows)
        return len(rows) <= self._max_rows and cached <= self._max_cached and (not admitted or read <= _PREFILL_TOKENS)


def _needs_no_slot(request: Request, others: Sequence[Request]) -> bool:
    return request.adapter is None or any(other.adapter == request.adapter for other in others)
