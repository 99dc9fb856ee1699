"""What a server does, without HTTP: names, prompts, requests in the batcher, text."""

import asyncio
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..bank.bank import AdapterBank
from ..engine.batcher import Batcher
from ..engine.memory import cache_bytes
from ..engine.settings import SamplingParams
from ..errors import BankError, QueueFull
from .adapter_folder import AdapterFolder
from .answers import ApiError, as_api_error
from .api import ChatRequest, CompletionRequest
from .completion import Completion
from .detokenize import TextStream
from .metrics import Measured, Metrics
from .prompts import Prompt, Prompts

_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens")


@dataclass(frozen=True)
class Limits:
    """Of one server.

    Args:
        slots: adapters on the device at once, and the most in one batch.
        max_rank: the largest rank that is served.
        max_rows: requests that run at once.
        queue: requests that may wait; 429 beyond.
        adapter_rows: likewise of one adapter's requests; None for ``max_rows``.
        adapter_waiting: likewise of one adapter's that wait; None for ``queue``.
        max_body_bytes: of a request; 413 beyond.
        max_tokens: prompt and completion of a request together; None is the model's context.
        max_cached: tokens that the cache holds; None is ``max_rows`` times ``max_tokens``, or what a share of the free
            memory holds (``Batcher``).
        drain_seconds: how long SIGTERM waits for requests to end.
        stall_seconds: how long a step may take before /health calls it stuck.
        host_bytes: of all adapters in host memory; those beyond are read from their folders when requests need them.
            None is a quarter of the memory that is free.
        max_adapter_bytes: of an adapter that comes in a request's body; 413 beyond.
        max_connections: at once; beyond, those without a request make room.
        head_seconds: how long the head of a request may take.
        links: folders into which symbolic links in the adapters' folder may lead.
        generation_config: whether the checkpoint's sampling settings stand where a request has none.
    """

    slots: int = 8
    max_rank: int = 64
    max_rows: int = 32
    queue: int = 256
    adapter_rows: int | None = None
    adapter_waiting: int | None = None
    max_body_bytes: int = 1 << 20
    max_tokens: int | None = None
    max_cached: int | None = None
    drain_seconds: float = 30.0
    stall_seconds: float = 120.0
    max_adapter_bytes: int = 1 << 30
    host_bytes: int | None = None
    max_connections: int = 1024
    head_seconds: float = 20.0
    links: tuple[str | Path, ...] = ()
    generation_config: bool = True


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
        host_bytes = limits.host_bytes or max(1, cache_bytes(torch.device("cpu"), 0))
        self.bank = AdapterBank(model, slots=limits.slots, max_rank=limits.max_rank, host_bytes=host_bytes)
        self.batcher = Batcher(
            self.bank,
            tokenizer,
            max_rows=limits.max_rows,
            max_tokens=limits.max_tokens,
            max_waiting=limits.queue,
            max_cached=limits.max_cached,
            adapter_rows=limits.adapter_rows,
            adapter_waiting=limits.adapter_waiting,
            stall_seconds=limits.stall_seconds,
        )
        self.folder = AdapterFolder(self.bank, adapters, name, limits.links)
        self.folder.scan()
        self.metrics = Metrics(self.batcher, name)
        # One thread each: tokenizers are not made for several at once, and one load at a time keeps memory in bounds.
        self.tokenizing, self.loading = (ThreadPoolExecutor(1, name) for name in ("tokenize", "load-adapter"))
        self._prompts = Prompts(tokenizer)
        self.defaults = sampling_defaults(model) if limits.generation_config else {}
        self._arrived: deque[tuple[Completion, int | None]] = deque()
        self._woken = False
        self._tokenized = 0  # requests whose prompts are being tokenized, or wait for it

    async def adapter(self, name: str) -> str | None:
        """What the request's ``model`` stands for; a checkpoint that came into the folder since is loaded now.

        Raises ApiError 404.
        """
        if name == self.name:
            return None
        if name not in self.bank and self.folder.path_of(name) is not None:
            await self.in_loading(self.folder.discover, name)
        if name in self.bank:
            return name
        reason = self.folder.errors.get(name)
        detail = f", its checkpoint is refused: {reason}" if reason else ""
        raise ApiError(404, f"The model {name[:200]!r} does not exist{detail}", "model", "model_not_found")

    async def in_loading(self, function, *arguments):
        """On the thread that loads adapters, one after the other."""
        return await asyncio.get_running_loop().run_in_executor(self.loading, function, *arguments)

    def problem(self) -> str | None:
        """Why nobody can be served, or None."""
        return self.batcher.problem()

    async def begin(self, request: CompletionRequest | ChatRequest, measured: Measured) -> list[Completion]:
        """Queue the request: a completion for each choice, all or none. Raises ApiError: 400, 404, 429, 503."""
        adapter = await self.adapter(request.model)
        measured.adapter = adapter or self.name
        if isinstance(request, ChatRequest):
            prompts = [await self._in_tokenizer(self._prompts.of_chat, request)]
        else:
            prompts = await self._in_tokenizer(self._prompts.of_completion, request)
        begun: list[Completion] = []
        try:
            for prompt in prompts:
                for i in range(request.n or 1):
                    begun.append(self._begin(request, prompt, i, adapter, measured))
        except BaseException:
            for completion in begun:
                completion.close()
            raise
        measured.prompt(sum(len(prompt.ids) for prompt in prompts))
        return begun

    def _begin(
        self,
        request: CompletionRequest | ChatRequest,
        prompt: Prompt,
        choice: int,
        adapter: str | None,
        measured: Measured,
    ) -> Completion:
        room = self.batcher.max_tokens - len(prompt.ids)
        most = max(min(room, self.defaults.get("max_new_tokens", room)), 1)
        new = most if request.new_tokens is None else request.new_tokens
        if max(new, 1) > room:
            given = f"{len(prompt.ids)} in the prompt, {new} in the completion"
            message = f"This model's maximum context length is {self.batcher.max_tokens} tokens. However, "
            # langchain knows the class by the code in the text, litellm by the sentence.
            message += f"{len(prompt.ids) + max(new, 1)} were requested ({given}): context_length_exceeded"
            raise ApiError(400, message, code="context_length_exceeded")
        completion = Completion(
            self.deliver,
            measured,
            prompt,
            new,
            TextStream(self.tokenizer, [*(request.stop or []), *prompt.stops]),
            self.tokenizer,
            first=choice == 0,
            echo=request.echoes,
            chat=isinstance(request, ChatRequest),
        )
        try:
            completion.handle = self.batcher.submit(
                prompt.ids,
                adapter=adapter,
                max_new_tokens=max(new, 1),
                on_token=completion.on_token,
                stop_token_ids=request.stop_token_ids or (),
                sampling=request.sampling(self.defaults, choice),
            )
        except (BankError, ValueError, TypeError) as error:
            raise as_api_error(error) from None
        completion.handle.add_done_callback(completion.on_end)
        return completion

    async def _in_tokenizer(self, function, *arguments):
        if self._tokenized >= self.limits.queue:
            raise as_api_error(QueueFull())
        self._tokenized += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self.tokenizing, function, *arguments)
        finally:
            self._tokenized -= 1

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


def sampling_defaults(model: nn.Module) -> dict[str, Any]:
    """What the checkpoint's generation_config says of sampling and length, of the settings that vLLM takes from it.

    Raises:
        ValueError: one of them is out of its range.
    """
    config = getattr(model, "generation_config", None)
    said = {} if config is None else config.to_diff_dict()
    found = {name: said[name] for name in _DEFAULTS if said.get(name) is not None}
    SamplingParams(**{name: value for name, value in found.items() if name != "max_new_tokens"})  # or nobody is served
    return found
