"""What a turn of the batcher does with its rows: join, step, and deal the tokens, each error to whom it concerns."""

from collections.abc import Sequence

from torch import Tensor

from ..errors import NotFinite
from .memory import device_lost
from .request import Request
from .rows import Rows
from .sampling import next_tokens


class Steps:
    """The rows' steps, and whether the model can take any.

    Args:
        rows: of the batch.

    Attributes:
        rows: as given.
        broken: what the bare model raised, where every forward of a turn failed; else None.
    """

    def __init__(self, rows: Rows):
        self.rows = rows
        self.broken: BaseException | None = None

    def turn(self, joining: Sequence[Request]) -> None:
        """Let rows in, and take one step with all."""
        before = self.rows.succeeded, self.rows.failed
        try:
            self._join(joining)
            stepped = self.rows.step()
            if stepped is not None:
                self._deal(*stepped)
        finally:
            if self.rows.succeeded > before[0]:
                self.broken = None
            elif self.rows.failed > before[1]:
                self.broken = self._probed()

    def end_cancelled(self) -> None:
        """Let the rows go that were cancelled."""
        for request in self.rows.requests:
            if request.cancelled:
                request.finish("cancelled")
        self.rows.leave()

    def _join(self, requests: Sequence[Request], last: bool = False) -> None:
        """Together, or, if that fails, one by one to find whose fault it is; who fails alone is tried again, once."""
        if not requests:
            return
        try:
            logits = self.rows.join(requests)
        except Exception as error:
            for request in requests:
                if last or device_lost(error):
                    request.finish("error", error)
                else:
                    self._join([request], last=len(requests) == 1)
            return
        if logits is not None:
            self._deal(list(requests), logits)

    def _deal(self, requests: Sequence[Request], logits: Tensor) -> None:
        if not requests:
            return
        for request, token in zip(requests, next_tokens(logits, requests), strict=True):
            if request.cancelled:
                request.finish("cancelled")
            elif token is None:
                request.finish("error", NotFinite(f"submit: the logits of adapter {request.adapter!r} are not numbers"))
            else:
                request.take(token)
        self.rows.leave()

    def _probed(self) -> BaseException | None:
        """What the bare model raises for one token: whether the fault is the requests' or the engine's."""
        try:
            self.rows.probe()
        except Exception as error:
            return error
        return None
