"""What a server does, without HTTP: names, prompts, requests in the batcher, text."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ..bank.bank import AdapterBank
from ..engine.batcher import Batcher
from ..engine.request import Request
from ..errors import BankError, BankFull, QueueFull, UnknownAdapter
from .adapter_folder import AdapterFolder
from .api import ApiError, ChatRequest, CompletionRequest
from .detokenize import TextStream
from .metrics import Measured, Metrics

_TICK = 0.01  # seconds between two looks for requests that ended without a token
log = logging.getLogger("uvicorn.error")


@dataclass(frozen=True)
class Limits:
    """Of one server.

    max_tokens: prompt and completion together, None is the model's context. max_cached: of all rows of the batch, each
    counted as the longest; None is ``max_rows`` times ``max_tokens``.
    """

    slots: int = 8
    max_rank: int = 64
    max_rows: int = 32
    queue: int = 256
    max_body_bytes: int = 1 << 20
    max_tokens: int | None = None
    max_cached: int | None = None
    drain_seconds: float = 30.0


class Service:
    """A model, its bank, its batcher and the folder of its adapters.

    Args:
        model: a causal language model of transformers, in eval mode. tokenizer: of transformers.
        adapters: folder of PEFT checkpoints, all loaded now; see ``folder.errors`` for those that were not.
        name: of the base model, in requests.
    """

    def __init__(self, model: nn.Module, tokenizer: object, adapters: str | Path, name: str, limits: Limits = Limits()):
        self.tokenizer, self.name, self.limits = tokenizer, name, limits
        self.created = int(time.time())
        self.bank = AdapterBank(model, slots=limits.slots, max_rank=limits.max_rank)
        most = {"max_rows": limits.max_rows, "max_tokens": limits.max_tokens, "max_cached": limits.max_cached}
        self.batcher = Batcher(self.bank, tokenizer, max_waiting=limits.queue, **most)
        self.folder = AdapterFolder(self.bank, adapters, name)
        self.folder.scan()
        self.metrics = Metrics(self.batcher)
        # One thread each: tokenizers are not made for several at once, and one load at a time keeps memory in bounds.
        self.tokenizing, self.loading = (ThreadPoolExecutor(1, name) for name in ("tokenize", "load-adapter"))
        self._active: set[Completion] = set()
        self._arrived: deque[tuple[Completion, int]] = deque()
        self._prompts = 0  # that are being tokenized, or wait for it

    def adapter(self, name: str) -> str | None:
        """What the request's ``model`` stands for. Raises ApiError 404."""
        if name == self.name:
            return None
        if name in self.bank:
            return name
        reason = self.folder.errors.get(name)
        detail = f", its checkpoint is refused: {reason}" if reason else ""
        raise ApiError(404, f"The model {name[:200]!r} does not exist{detail}", "model", "model_not_found")

    async def begin(self, request: CompletionRequest | ChatRequest, measured: Measured) -> "Completion":
        """Queue the request. Raises ApiError: 400, 404, 413, 429, 503."""
        adapter = self.adapter(request.model)
        measured.adapter = adapter or self.name
        stops = request.stop or []
        if isinstance(request, ChatRequest):
            ids = await self._in_tokenizer(self._chat_ids, request)
            stops = stops if self.tokenizer.chat_template else [*stops, _NEXT_USER]
        else:
            ids = request.prompt
            ids = await self._in_tokenizer(self._ids, ids) if isinstance(ids, str) else ids
        room = self.batcher.max_tokens - len(ids)
        new = request.new_tokens or max(room, 1)
        if new > room:
            given = f"{len(ids)} tokens of prompt and {new} to generate"
            message = f"{given} are more than the {self.batcher.max_tokens} that a request may have"
            raise ApiError(413, message, code="context_length_exceeded")
        completion = Completion(self, measured, len(ids), new, TextStream(self.tokenizer, stops))
        try:
            completion.handle = self.batcher.submit(
                ids,
                adapter=adapter,
                max_new_tokens=new,
                temperature=1.0 if request.temperature is None else request.temperature,
                top_p=request.top_p or 1.0,
                seed=request.seed,
                on_token=completion.on_token,
            )
        except (BankError, ValueError, TypeError) as error:
            raise as_api_error(error) from None
        self._active.add(completion)
        measured.prompt(len(ids))
        return completion

    async def _in_tokenizer(self, function, *arguments):
        if self._prompts >= self.limits.queue:
            raise as_api_error(QueueFull())
        self._prompts += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self.tokenizing, function, *arguments)
        finally:
            self._prompts -= 1

    def _ids(self, text: str, special: bool = True) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def _chat_ids(self, request: ChatRequest) -> list[int]:
        messages = [message.plain() for message in request.messages]
        if not self.tokenizer.chat_template:
            return self._ids(plain_chat(messages))
        try:
            text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # a template may refuse what it likes: roles that do not alternate, a system message
            raise ApiError(400, f"messages: the chat template refuses them: {error}", "messages") from None
        return self._ids(text, special=False)

    def deliver(self, completion: "Completion", token: int) -> None:
        """From the batcher's thread to the event loop, which is woken once for all tokens of a step.

        A closed loop raises here, which ends the request.
        """
        idle = not self._arrived
        self._arrived.append((completion, token))
        if idle:
            completion.loop.call_soon_threadsafe(self._hand_out)

    def _hand_out(self) -> None:
        while self._arrived:
            completion, token = self._arrived.popleft()
            completion.tokens.put_nowait(token)

    async def watch(self) -> None:
        """Runs as long as the server: tells completions that their request has ended."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(_TICK)
            for completion in [c for c in self._active if c.handle.done]:
                self._active.discard(completion)
                loop.call_soon(completion.tokens.put_nowait, None)  # after the tokens, which came the same way

    def stop(self) -> None:
        """Cancel what still runs and take the bank off the model."""
        self.batcher.stop(drain=False, timeout=60)
        self.tokenizing.shutdown()
        self.loading.shutdown()
        self.bank.close()


class Completion:
    """One request from its first token to its last, in the event loop that made it."""

    handle: Request

    def __init__(self, service: Service, measured: Measured, prompt: int, new: int, text: TextStream):
        self.tokens: asyncio.Queue[int | None] = asyncio.Queue()
        self.prompt_tokens, self.completion_tokens = prompt, 0
        self._service, self._measured, self._new, self._text = service, measured, new, text
        self.loop = asyncio.get_running_loop()

    def on_token(self, token: int) -> None:
        """On the batcher's thread."""
        self._service.deliver(self, token)

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
            raise as_api_error(self.handle.error)
        if self.handle.finish_reason == "cancelled":
            raise ApiError(503, "The server is stopping", code="stopping")
        return self._text.finish()

    def close(self) -> None:
        """Free the request's row, if it has one."""
        self.handle.cancel()
        self._service._active.discard(self)


_NEXT_USER = "\nuser:"


def plain_chat(messages: list[dict[str, str]]) -> str:
    """The prompt of a chat where the tokenizer has no template: ``role: content`` lines, then ``assistant:``.

    The answer then also ends where the next line would begin with ``user:``.
    """
    return "".join(f"{message['role']}: {message['content']}\n" for message in messages) + "assistant:"


def as_api_error(error: BaseException) -> ApiError:
    """Of the bank or the batcher."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        return ApiError(429, "The queue is full, try again later", code="queue_full", retry_after=1)
    if isinstance(error, BankFull):
        return ApiError(503, "All slots for adapters are pinned or in use", code="bank_full", retry_after=1)
    if isinstance(error, UnknownAdapter):
        return ApiError(404, "The model was unloaded", "model", "model_not_found")
    if isinstance(error, ValueError | TypeError):
        return ApiError(400, str(error).removeprefix("submit: "), "prompt")
    if isinstance(error, BankError) and "stopping" in str(error):
        return ApiError(503, "The server is stopping", code="stopping")
    log.error("a request failed", exc_info=error)
    return ApiError(500, "The request failed", code="internal_error")
