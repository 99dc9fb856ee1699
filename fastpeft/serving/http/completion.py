"""One answer as it comes: tokens of the batcher's thread become text in the event loop."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from ..engine.request import Request
from ..errors import BankError
from . import logprobs
from .answers import ApiError, Piece, as_api_error
from .detokenize import TextStream
from .metrics import Measured
from .prompts import Prompt


class Completion:
    """One choice of a request from its first token to its last, in the event loop that made it.

    Args:
        deliver: brings a token, or None for the end, from the batcher's thread to ``tokens``.
        measured: counts tokens.
        prompt: that is answered.
        new: the most tokens; 0 asks for the prompt alone.
        text: of the answer.
        tokenizer: of transformers.
        first: whether it is the first choice of its prompt.
        echo: whether the prompt comes first.
        chat: whether it is a chat's.

    Attributes:
        handle: in the batcher.
        prompt: as given.
        completion_tokens: so far.
        first: as given.
    """

    handle: Request

    def __init__(
        self,
        deliver: "Callable[[Completion, int | None], None]",
        measured: Measured,
        prompt: Prompt,
        new: int,
        text: TextStream,
        tokenizer: Any,
        first: bool,
        echo: bool = False,
        chat: bool = False,
    ):
        self.first, self.prompt = first, prompt
        self.tokens: asyncio.Queue[int | None] = asyncio.Queue()
        self.completion_tokens = 0
        self._deliver, self._measured, self._new, self._text = deliver, measured, new, text
        self._tokenizer, self._echo, self._chat = tokenizer, echo, chat
        self._told = self._characters = 0  # of tokens whose log-probabilities were told
        self.loop = asyncio.get_running_loop()

    def on_token(self, token: int) -> None:
        """On the batcher's thread."""
        self._deliver(self, token)

    def on_end(self, _: Request) -> None:
        """Likewise, after the last token."""
        self._deliver(self, None)

    async def pieces(self) -> AsyncIterator[Piece]:
        """Text as it comes, and with the last piece why it ended: "stop", "length" or "tool_calls". Raises ApiError.

        A piece is all that has come since the one before: each costs a system call, in which the loop gives the
        interpreter to the batcher, and where those take longer than a step, tokens would pile up.
        """
        echoed = self.prompt.text if self._echo else ""
        held: list[str] = []
        while True:
            tokens = [await self.tokens.get()]
            while not self.tokens.empty():
                tokens.append(self.tokens.get_nowait())
            text, finish = self._text_of(tokens)
            if self.prompt.parse is not None:  # what is a call and what is text is known at the end
                held.append(text)
                if finish:
                    yield self._parsed("".join(held), finish)
                    return
            elif echoed or text or finish:
                yield Piece(echoed + text, finish, self._logprobs())
                echoed = ""
                if finish:
                    return

    async def whole(self) -> Piece:
        """All of it in one piece. Raises ApiError."""
        all_of_it = Piece()
        async for piece in self.pieces():
            all_of_it.text += piece.text
            all_of_it.finish, all_of_it.message = piece.finish, piece.message
            all_of_it.logprobs = logprobs.joined(all_of_it.logprobs, piece.logprobs)
        return all_of_it

    def _text_of(self, tokens: list[int | None]) -> tuple[str, str | None]:
        text = ""
        for token in tokens:
            if token is None:
                return text + self._ended(), "stop"
            if self._new == 0:
                return text, "length"
            self.completion_tokens += 1
            self._measured.token()
            text += self._text.push(token)
            if self._text.stopped:
                return text, "stop"
            if self.completion_tokens == self._new:
                return text + self._text.finish(), "length"
        return text, None

    def _logprobs(self) -> dict[str, Any] | None:
        """Of the tokens since the last call, the prompt's before them."""
        params = self.handle.params
        if params.logprobs is None:
            return None
        found = self.handle.logprobs[: self.completion_tokens]
        if self._chat:
            told, self._told = self._told, len(found)
            return logprobs.of_chat(self._tokenizer, found[told:])
        ids = [each.token for each in found]
        if self._echo:
            ids, found = self.handle.prompt + ids, self.handle.prompt_logprobs + found
        told, self._told = self._told, len(found)
        form = logprobs.of_completion(self._tokenizer, ids[told:], found[told:], self._characters)
        self._characters += sum(map(len, form["tokens"]))
        return form

    def _parsed(self, text: str, finish: str) -> Piece:
        """The message that the template's own parsing makes of the answer; a text that it cannot read stays text."""
        tokens = self.handle.tokens[: self.completion_tokens]  # others may have come after a stop string
        message = None if self.prompt.parse is None else self.prompt.parse(tokens)
        if message is not None and message.get("tool_calls") and finish == "stop":
            finish = "tool_calls"
        return Piece(text, finish, self._logprobs(), message)

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
