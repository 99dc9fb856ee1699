"""What a server does, without HTTP: names, prompts, requests in the batcher, text."""

import asyncio
import inspect
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..bank.bank import AdapterBank
from ..engine.batcher import Batcher
from ..errors import BankError, QueueFull
from .adapter_folder import AdapterFolder
from .answers import ApiError, as_api_error
from .api import ChatRequest, CompletionRequest
from .completion import Completion
from .detokenize import TextStream
from .metrics import Measured, Metrics


@dataclass(frozen=True)
class Limits:
    """Of one server.

    Args:
        slots: adapters on the device at once, and the most in one batch.
        max_rank: the largest rank that is served.
        max_rows: requests that run at once.
        queue: requests that may wait; 429 beyond.
        max_body_bytes: of a request; 413 beyond.
        max_tokens: prompt and completion of a request together; None is the model's context.
        max_cached: tokens of all rows of the batch, each counted as the longest; None is ``max_rows`` times
            ``max_tokens``.
        drain_seconds: how long SIGTERM waits for requests to end.
        stall_seconds: how long a step may take before /health calls it stuck.
    """

    slots: int = 8
    max_rank: int = 64
    max_rows: int = 32
    queue: int = 256
    max_body_bytes: int = 1 << 20
    max_tokens: int | None = None
    max_cached: int | None = None
    drain_seconds: float = 30.0
    stall_seconds: float = 120.0


class Service:
    """A model, its bank, its batcher and the folder of its adapters.

    Args:
        model: a causal language model of transformers, in eval mode.
        tokenizer: of transformers.
        adapters: folder of PEFT checkpoints, all loaded now; see ``folder.errors`` for those that were not.
        name: of the base model, in requests.
        limits: of memory, lengths and times.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, adapters: str | Path, name: str, limits: Limits = Limits()):
        self.tokenizer, self.name, self.limits = tokenizer, name, limits
        self.created = int(time.time())
        self.bank = AdapterBank(model, slots=limits.slots, max_rank=limits.max_rank)
        self.batcher = Batcher(
            self.bank,
            tokenizer,
            max_rows=limits.max_rows,
            max_tokens=limits.max_tokens,
            max_waiting=limits.queue,
            max_cached=limits.max_cached,
            stall_seconds=limits.stall_seconds,
        )
        self.folder = AdapterFolder(self.bank, adapters, name)
        self.folder.scan()
        self.metrics = Metrics(self.batcher, name)
        # One thread each: tokenizers are not made for several at once, and one load at a time keeps memory in bounds.
        self.tokenizing, self.loading = (ThreadPoolExecutor(1, name) for name in ("tokenize", "load-adapter"))
        self._template_reserved = frozenset(inspect.signature(tokenizer.apply_chat_template).parameters)
        self._arrived: deque[tuple[Completion, int | None]] = deque()
        self._woken = False
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

    def problem(self) -> str | None:
        """Why nobody can be served, or None."""
        return self.batcher.problem()

    async def begin(self, request: CompletionRequest | ChatRequest, measured: Measured) -> list[Completion]:
        """Queue the request: a completion for each choice, all or none. Raises ApiError: 400, 404, 429, 503."""
        adapter = self.adapter(request.model)
        measured.adapter = adapter or self.name
        stops = request.stop or []
        if isinstance(request, ChatRequest):
            prompts = [await self._in_tokenizer(self._chat_ids, request)]
            stops = stops if self.tokenizer.chat_template else [*stops, _NEXT_USER]
        else:
            special = request.add_special_tokens is not False
            prompts = [
                await self._in_tokenizer(self._ids, each, special) if isinstance(each, str) else each
                for each in request.prompt
            ]
        begun: list[Completion] = []
        try:
            for ids in prompts:
                for i in range(request.n or 1):
                    begun.append(self._begin(request, ids, i, adapter, measured, stops))
        except BaseException:
            for completion in begun:
                completion.close()
            raise
        measured.prompt(sum(map(len, prompts)))
        return begun

    def _begin(
        self,
        request: CompletionRequest | ChatRequest,
        ids: list[int],
        choice: int,
        adapter: str | None,
        measured: Measured,
        stops: list[str],
    ) -> Completion:
        room = self.batcher.max_tokens - len(ids)
        new = request.new_tokens or max(room, 1)
        if new > room:
            most, given = self.batcher.max_tokens, f"{len(ids)} in the prompt, {new} in the completion"
            message = f"This model's maximum context length is {most} tokens. However, {len(ids) + new} were requested"
            raise ApiError(400, f"{message} ({given}).", code="context_length_exceeded")
        completion = Completion(self.deliver, measured, len(ids), new, TextStream(self.tokenizer, stops), choice == 0)
        try:
            completion.handle = self.batcher.submit(
                ids,
                adapter=adapter,
                max_new_tokens=new,
                temperature=1.0 if request.temperature is None else request.temperature,
                top_p=1.0 if request.top_p is None else request.top_p,
                seed=None if request.seed is None else request.seed + choice,
                on_token=completion.on_token,
                stop_token_ids=request.stop_token_ids or (),
            )
        except (BankError, ValueError, TypeError) as error:
            raise as_api_error(error) from None
        completion.handle.add_done_callback(completion.on_end)
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
        reserved = sorted(self._template_reserved & request.template_variables.keys())
        if reserved:
            raise ApiError(
                400, f"chat_template_kwargs: {reserved[0]!r} is not the client's to set", "chat_template_kwargs"
            )
        try:
            text = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False, **request.template_variables
            )
        except Exception as error:  # a template may refuse what it likes: roles that do not alternate, a system message
            raise ApiError(400, f"messages: the chat template refuses them: {error}", "messages") from None
        return self._ids(text, special=False)

    def deliver(self, completion: Completion, token: int | None) -> None:
        """From the batcher's thread to the event loop, which is woken once for all tokens of a step; None is the end.

        A closed loop raises here, which ends the request.
        """
        self._arrived.append((completion, token))
        # The loop takes the mark away before it looks: whatever came until then it finds, and for what comes after it
        # is woken again.
        if not self._woken:
            self._woken = True
            completion.loop.call_soon_threadsafe(self._hand_out)

    def _hand_out(self) -> None:
        self._woken = False
        while self._arrived:
            completion, token = self._arrived.popleft()
            completion.tokens.put_nowait(token)

    def stop(self) -> None:
        """Cancel what still runs and take the bank off the model."""
        self.batcher.stop(drain=False, timeout=60)
        self.tokenizing.shutdown()
        self.loading.shutdown()
        self.bank.close()


_NEXT_USER = "\nuser:"


def plain_chat(messages: list[dict[str, str]]) -> str:
    """The prompt of a chat where the tokenizer has no template: ``role: content`` lines, then ``assistant:``.

    The answer then also ends where the next line would begin with ``user:``.
    """
    return "".join(f"{message['role']}: {message['content']}\n" for message in messages) + "assistant:"
