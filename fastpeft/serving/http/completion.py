"""One answer as it comes: tokens of the batcher's thread become text in the event loop."""

import asyncio
from collections.abc import AsyncIterator, Callable

from ..engine.request import Request
from ..errors import BankError
from .answers import ApiError, as_api_error
from .detokenize import TextStream
from .metrics import Measured


class Completion:
    """One choice of a request from its first token to its last, in the event loop that made it.

    Attributes:
        handle: in the batcher.
        prompt_tokens, completion_tokens: so far.
        first: whether it is the first choice of its prompt.
    """

    handle: Request

    def __init__(
        self,
        deliver: "Callable[[Completion, int | None], None]",
        measured: Measured,
        prompt: int,
        new: int,
        text: TextStream,
        first: bool,
    ):
        self.first = first
        self.tokens: asyncio.Queue[int | None] = asyncio.Queue()
        self.prompt_tokens, self.completion_tokens = prompt, 0
        self._deliver, self._measured, self._new, self._text = deliver, measured, new, text
        self.loop = asyncio.get_running_loop()

    def on_token(self, token: int) -> None:
        """On the batcher's thread."""
        self._deliver(self, token)

    def on_end(self, _: Request) -> None:
        """Likewise, after the last token."""
        self._deliver(self, None)

    async def pieces(self) -> AsyncIterator[tuple[str, str | None]]:
        """Text as it comes, and with the last piece why it ended: "stop" or "length". Raises ApiError.

        A piece is all that has come since the one before: each costs a system call, in which the loop gives the
        interpreter to the batcher, and where those take longer than a step, tokens would pile up.
        """
        while True:
            tokens = [await self.tokens.get()]
            while not self.tokens.empty():
                tokens.append(self.tokens.get_nowait())
            piece, finish = self._text_of(tokens)
            if piece or finish:
                yield piece, finish
            if finish:
                return

    def _text_of(self, tokens: list[int | None]) -> tuple[str, str | None]:
        piece = ""
        for token in tokens:
            if token is None:
                return piece + self._ended(), "stop"
            self.completion_tokens += 1
            self._measured.token()
            piece += self._text.push(token)
            if self._text.stopped:
                return piece, "stop"
            if self.completion_tokens == self._new:
                return piece + self._text.finish(), "length"
        return piece, None

    def _ended(self) -> str:
        """What is left when the request has ended without a last token."""
        if self.handle.finish_reason == "error":
            raise as_api_error(self.handle.error or BankError("submit: ended without a reason"))
        if self.handle.finish_reason == "cancelled":
            raise ApiError(503, "The server is stopping", code="stopping")
        return self._text.finish()

    def close(self) -> None:
        """Free the request's row, if it has one."""
        self.handle.cancel()
