"""One request for tokens over HTTP: its body in, the answer out, whole or as server-sent events."""

import asyncio
import contextlib
import json
from collections.abc import Awaitable

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from starlette.requests import ClientDisconnect

from .api import Answer, ApiError, ChatRequest, CompletionRequest, parse, usage
from .metrics import DISCONNECTED, Measured
from .service import Completion, Service

_BODY_SECONDS = 60.0
_DISCARD_SECONDS, _DISCARD_BYTES = 1.0, 64 << 20


class Generation(Response):
    """Answers one request for tokens, whole or as server-sent events; frees its row when the client goes away."""

    def __init__(self, service: Service, request: Request, kind: type[CompletionRequest] | type[ChatRequest]):
        self.service, self.request, self.kind = service, request, kind
        self.background = None
        self._streaming = False

    async def __call__(self, scope, receive, send) -> None:
        measured, completion, status = Measured(self.service.metrics), None, DISCONNECTED
        try:
            asked = parse(self.kind, await body_of(self.request, self.service.limits.max_body_bytes))
            completion = await self.service.begin(asked, measured)
            answer = Answer(asked.model, self.kind is ChatRequest)
            work = self._stream(completion, answer, asked, send) if asked.stream else self._whole(completion, answer)
            response = await _while_connected(receive, work)
            if response is not None:
                await response(scope, receive, send)
            status = 200
        except ApiError as error:
            status = error.status
            if self._streaming:
                await self._events(send, error.body(), "[DONE]", last=True)
            else:
                await error_response(error)(scope, receive, send)
        except _GoneError:
            pass
        except Exception:
            status = 500
            raise
        finally:
            if completion is not None:
                completion.close()
            measured.end(status)

    async def _whole(self, completion: Completion, answer: Answer) -> Response:
        text, reason = "", None
        async for piece, finish in completion.pieces():
            text, reason = text + piece, finish
        counts = usage(completion.prompt_tokens, completion.completion_tokens)
        return JSONResponse(answer.whole(text, reason, counts))

    async def _stream(self, completion: Completion, answer: Answer, asked: CompletionRequest | ChatRequest, send):
        async for piece, finish in completion.pieces():
            if not self._streaming:  # only now: an error before the first token still has its own status
                self._streaming = True
                head = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
                await send({"type": "http.response.start", "status": 200, "headers": head})
                if answer.chat:
                    await self._events(send, answer.chunk("", None, first=True))
            if finish is None or (piece and answer.chat):
                await self._events(send, answer.chunk(piece, None))
                piece = ""
            if finish is not None:
                await self._events(send, answer.chunk(piece, finish))
        if asked.stream_options and asked.stream_options.include_usage:
            counts = usage(completion.prompt_tokens, completion.completion_tokens)
            await self._events(send, answer.usage_chunk(counts))
        await self._events(send, "[DONE]", last=True)

    async def _events(self, send, *events: dict | str, last: bool = False) -> None:
        texts = (event if isinstance(event, str) else json.dumps(event, ensure_ascii=False) for event in events)
        body = "".join(f"data: {text}\n\n" for text in texts).encode("utf-8", "replace")
        await send({"type": "http.response.body", "body": body, "more_body": not last})


class _GoneError(Exception):
    """The client has disconnected."""


async def _while_connected(receive, work: Awaitable) -> object:
    """The work's result; when the client disconnects first, the work is cancelled and _GoneError raised."""

    async def disconnected():
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = task, gone = asyncio.ensure_future(work), asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise _GoneError
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def body_of(request: Request, limit: int) -> bytes:
    """The body of a POST, never more than ``limit`` bytes of it in memory. Raises ApiError 400, 408, 413, 415."""
    # A page in a browser may send other types to a server on loopback without asking it first.
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"Content-Type is {kind[:100]!r}, expected application/json")
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
        whole = await asyncio.wait_for(read(), _BODY_SECONDS)
    except asyncio.TimeoutError:
        raise ApiError(408, f"The body did not arrive within {_BODY_SECONDS:.0f} s") from None
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


def error_response(error: ApiError) -> Response:
    """In OpenAI's form."""
    # What stays unread of a body must not be taken for the next request.
    headers = {**error.headers, **({"Connection": "close"} if error.status in (408, 413, 415) else {})}
    return JSONResponse(error.body(), error.status, headers)
