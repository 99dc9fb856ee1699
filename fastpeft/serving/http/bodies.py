"""Bodies of requests, bounded in size, time and kind."""

import asyncio
import contextlib

from fastapi import Request
from starlette.requests import ClientDisconnect

from .answers import ApiError

_BODY_SECONDS = 60.0
_DISCARD_SECONDS, _DISCARD_BYTES = 1.0, 64 << 20


async def body_of(
    request: Request, limit: int, kind: str = "application/json", seconds: float = _BODY_SECONDS
) -> bytes:
    """The body of a POST, never more than ``limit`` bytes of it in memory. Raises ApiError 400, 408, 413, 415."""
    # A page in a browser may send other types to a server on loopback without asking it first.
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if given != kind:
        await _discard(request)
        raise ApiError(415, f"Content-Type is {given[:100]!r}, expected {kind}")
    too_large = ApiError(413, f"The body is larger than {limit} bytes", code="body_too_large")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > limit:
        await _discard(request)
        raise too_large
    body = bytearray()

    async def read():
        async for chunk in request.stream():
            body.extend(chunk)
            if len(body) > limit:
                return False
        return True

    try:
        whole = await asyncio.wait_for(read(), seconds)
    except asyncio.TimeoutError:
        raise ApiError(408, f"The body did not arrive within {seconds:.0f} s") from None
    if not whole:
        await _discard(request)
        raise too_large
    return bytes(body)


async def _discard(request: Request) -> None:
    """Read on for a moment: a connection that is closed over unread bytes is reset, and the answer lost with it."""

    async def read(left: int):
        async for chunk in request.stream():
            left -= len(chunk)
            if left < 0:
                return

    with contextlib.suppress(asyncio.TimeoutError, ClientDisconnect):
        await asyncio.wait_for(read(_DISCARD_BYTES), _DISCARD_SECONDS)
