"""Connections cost something also when nothing comes through them: how many, and how long a request's head may take."""

import asyncio
import socket
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

_RESERVED_FILES = 64  # descriptors for all that is no connection
_UNANSWERED_SECONDS = 60  # a peer that has not acknowledged anything for so long is gone


def bounded_protocol(most: int, head_seconds: float) -> type[asyncio.Protocol]:
    """uvicorn's protocol, with bounds.

    Where the bound is reached a new connection takes the place of the one that has been silent for longest of those
    that have no request, only half of one's head or nothing; where all have requests, it is closed.

    Args:
        most: connections at once; fewer where the process may not open so many files.
        head_seconds: from the connection's begin, or a later request's first byte, to the end of the head.
    """
    most = _openable(most)
    opened: dict[Any, None] = {}  # the one that has been silent for longest first

    class Bounded(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
        head_due: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            opened[self] = None
            self._await_head()
            if len(opened) > most:
                dropped = next((each for each in opened if not each.has_request()), self)
                del opened[dropped]
                dropped.transport.abort()

        def data_received(self, data: bytes) -> None:
            if self in opened:
                opened[self] = opened.pop(self)
            if not self.has_request():
                self._await_head()
            super().data_received(data)
            if self.has_request():
                self._head_came()

        def connection_lost(self, exc: Exception | None) -> None:
            self._head_came()
            opened.pop(self, None)
            super().connection_lost(exc)

        def has_request(self) -> bool:
            return self.cycle is not None and not self.cycle.response_complete

        def _await_head(self) -> None:
            if self.head_due is None:
                self.head_due = asyncio.get_running_loop().call_later(head_seconds, self.transport.abort)

        def _head_came(self) -> None:
            if self.head_due is not None:
                self.head_due.cancel()
                self.head_due = None

    return Bounded


def _openable(most: int) -> int:
    if resource is None:
        return most
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return most if files == resource.RLIM_INFINITY else max(1, min(most, files - _RESERVED_FILES))


def drop_dead_peers(listener: socket.socket) -> None:
    """Have the system end connections whose peer does not answer any more; those it accepts inherit it."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        ("TCP_KEEPIDLE", _UNANSWERED_SECONDS),
        ("TCP_KEEPINTVL", 10),
        ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", 1000 * _UNANSWERED_SECONDS),
    ):
        if hasattr(socket, option):
            listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
