"""One request for tokens over HTTP: its body in, the answer out, whole or as server-sent events."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Sequence

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from .answers import Answer, ApiError, Piece, usage
from .api import ChatRequest, CompletionRequest, StreamOptions, parse
from .bodies import body_of
from .completion import Completion
from .metrics import DISCONNECTED, Measured
from .service import Service

_SEND_SECONDS = 60.0  # a client that takes nothing for so long is gone


class Generation(Response):
    """Answers one request for tokens, whole or as server-sent events; frees its row when the client goes away."""

    def __init__(self, service: Service, request: Request, kind: type[CompletionRequest] | type[ChatRequest]):
        self.service, self.request, self.kind = service, request, kind
        self.background = None
        self._streaming = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        measured, status, send = Measured(self.service.metrics), DISCONNECTED, _impatient(send)
        begun: list[Completion] = []
        try:
            asked = parse(self.kind, await body_of(self.request, self.service.limits.max_body_bytes))
            begun = await self.service.begin(asked, measured)
            answer = Answer(asked.model, self.kind is ChatRequest)
            work = self._stream(begun, answer, asked, send) if asked.stream else self._whole(begun, answer)
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
        except (_GoneError, ClientDisconnect):
            pass
        except Exception:
            status = 500
            raise
        finally:
            for completion in begun:
                completion.close()
            measured.end(status)

    async def _whole(self, begun: Sequence[Completion], answer: Answer) -> Response:
        pieces = [await completion.whole() for completion in begun]
        answer.of_version(begun[0].handle.version)
        return JSONResponse(answer.whole(pieces, _counts(begun)))

    async def _stream(
        self, begun: Sequence[Completion], answer: Answer, asked: CompletionRequest | ChatRequest, send: Send
    ) -> None:
        options = asked.stream_options or StreamOptions()

        def used() -> dict[str, int] | None:
            return _counts(begun) if options.continuous_usage_stats else None

        async for index, piece in _merged(begun):
            if not self._streaming:  # only now: an error before the first token still has its own status
                self._streaming = True
                answer.of_version(begun[0].handle.version)
                head = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
                await send({"type": "http.response.start", "status": 200, "headers": head})
                if answer.chat:
                    await self._events(send, *(answer.chunk(Piece(), i, first=True) for i in range(len(begun))))
            finish, piece.finish = piece.finish, None
            if finish is None or (answer.chat and (piece.text or piece.message)):
                await self._events(send, answer.chunk(piece, index, used=used()))
                piece = Piece()
            if finish is not None:
                piece.finish = finish
                await self._events(send, answer.chunk(piece, index, used=used()))
        if options.include_usage:
            await self._events(send, answer.usage_chunk(_counts(begun)))
        await self._events(send, "[DONE]", last=True)

    async def _events(self, send: Send, *events: dict | str, last: bool = False) -> None:
        texts = (event if isinstance(event, str) else json.dumps(event, ensure_ascii=False) for event in events)
        body = "".join(f"data: {text}\n\n" for text in texts).encode("utf-8", "replace")
        await send({"type": "http.response.body", "body": body, "more_body": not last})


def _counts(begun: Sequence[Completion]) -> dict[str, int]:
    """Tokens of all choices; a prompt that has several counts once."""
    prompts = sum(len(completion.prompt.ids) for completion in begun if completion.first)
    return usage(prompts, sum(completion.completion_tokens for completion in begun))


async def _merged(begun: Sequence[Completion]) -> AsyncIterator[tuple[int, Piece]]:
    """Pieces of several completions with their choice's number, as they come."""
    if len(begun) == 1:
        async for piece in begun[0].pieces():
            yield 0, piece
        return
    arrived: asyncio.Queue[tuple[int, Piece] | BaseException] = asyncio.Queue()

    async def follow(index: int, completion: Completion) -> None:
        try:
            async for piece in completion.pieces():
                arrived.put_nowait((index, piece))
        except Exception as error:
            arrived.put_nowait(error)

    tasks = [asyncio.ensure_future(follow(i, completion)) for i, completion in enumerate(begun)]
    try:
        left = len(begun)
        while left:
            item = await arrived.get()
            if isinstance(item, BaseException):
                raise item
            left -= item[1].finish is not None
            yield item
    finally:
        for task in tasks:
            task.cancel()


class _GoneError(Exception):
    """The client has disconnected, or does not read."""


def _impatient(send: Send) -> Send:
    async def within(message: Message) -> None:
        try:
            await asyncio.wait_for(send(message), _SEND_SECONDS)
        except asyncio.TimeoutError:
            raise _GoneError from None

    return within


async def _while_connected(receive: Receive, work: Awaitable[Response | None]) -> Response | None:
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


def error_response(error: ApiError) -> Response:
    """In OpenAI's form."""
    # What stays unread of a body must not be taken for the next request.
    headers = {**error.headers, **({"Connection": "close"} if error.status in (408, 413, 415) else {})}
    return JSONResponse(error.body(), error.status, headers)
