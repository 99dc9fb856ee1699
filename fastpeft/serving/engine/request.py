"""One request for tokens: what was asked, what has come so far, how it ended."""

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral
from typing import Any

import torch

from ... import _check
from ..bank.lease import Lease
from .settings import SamplingParams

_log = logging.getLogger("fastpeft.serving")


class Request:
    """A handle on one request; made by ``Batcher.submit``, read and cancelled by any thread.

    Attributes:
        prompt: the input ids.
        adapter: its name, or None for the bare model.
        max_new_tokens: the most that are generated.
        params: how its tokens are chosen.
        stop_ids: the ids that end it.
        on_token: called with each new token on the batcher's thread, or None.
        tokens: the new tokens so far, without the id that ended it.
        logprobs: ``TokenLogprobs`` of each of them, if ``params`` ask for those.
        next_logprobs: of the token that ``take`` is called with next.
        prompt_logprobs: likewise of the prompt's tokens, None for the first; once the prompt has been read.
        finish_reason: None while it waits or runs; then "stop" (one of ``stop_ids`` came), "length", "cancelled" or
            "error".
        error: the exception, after "error".
        lease: the hold on its adapter while it runs.
        version: of the adapter that answers, None before it runs and for the bare model.
        overtaken: how many requests came later and began before it.
        generator: of its draws, None where it is greedy.
        concerned: tokens whose logits its ``params`` change, None before the first step or where they change none.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        adapter: str | None,
        max_new_tokens: int,
        params: SamplingParams,
        stop_ids: frozenset[int],
        on_token: Callable[[int], object] | None,
    ):
        self.prompt, self.adapter, self.max_new_tokens = list(prompt), adapter, max_new_tokens
        self.params, self.stop_ids, self.on_token = params, stop_ids, on_token
        self.tokens: list[int] = []
        self.logprobs: list[Any] = []
        self.next_logprobs: Any = None
        self.prompt_logprobs: list[Any] = []
        self.finish_reason: str | None = None
        self.error: BaseException | None = None
        self.version: int | None = None
        self._lease: Lease | None = None
        self.overtaken = 0
        self.generator: torch.Generator | None = None
        self.concerned: Any = None
        if params.temperature > 0:
            self.generator = torch.Generator()
            self.generator.manual_seed(self.generator.seed() if params.seed is None else params.seed)
        self._cancelled = False
        self._done = threading.Event()
        self._ending = threading.Lock()
        self._callbacks: list[Callable[[Request], object]] = []

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        return self._done.is_set()

    @property
    def lease(self) -> Lease | None:
        return self._lease

    @lease.setter
    def lease(self, lease: Lease | None) -> None:
        self._lease = lease
        if lease is not None:
            self.version = lease.version

    @property
    def cancelled(self) -> bool:
        """Whether ``cancel`` was called."""
        return self._cancelled

    def cancel(self) -> None:
        """End it before the next token; what has come so far stays. After the end it does nothing."""
        self._cancelled = True

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the end.

        Args:
            timeout: in seconds; None waits as long as it takes.

        Returns:
            Whether it has come.
        """
        return self._done.wait(timeout)

    def result(self, timeout: float | None = None) -> list[int]:
        """Wait for the end and return the new tokens; those that had come, after ``cancel``.

        Args:
            timeout: in seconds; None waits as long as it takes.

        Returns:
            A list of ids, without the one that ended it.

        Raises:
            TimeoutError: the end has not come in that time; the request goes on.
            Exception: whatever ended the request in error.
        """
        if not self._done.wait(timeout):
            raise TimeoutError(f"result: the request has not ended within {timeout} s")
        if self.error is not None:
            raise self.error
        return list(self.tokens)

    def add_done_callback(self, function: Callable[["Request"], object]) -> None:
        """Have a function called when the request ends, or now if it has ended.

        Args:
            function: gets the request, on the thread that ends it, which it holds up; its exceptions are logged.
        """
        with self._ending:
            if not self.done:
                self._callbacks.append(function)
                return
        self._call(function)

    def _call(self, function: Callable[["Request"], object]) -> None:
        try:
            function(self)
        except Exception:
            _log.exception("a done callback of a request failed")

    def take(self, token: int) -> None:
        """Add the next token, and end where it ends. Errors of ``on_token`` are this request's alone."""
        if token in self.stop_ids:
            self.finish("stop")
            return
        self.tokens.append(token)
        if self.next_logprobs is not None:
            self.logprobs.append(self.next_logprobs)
        try:
            if self.on_token is not None:
                self.on_token(token)
        except Exception as error:
            self.finish("error", error)
            return
        if len(self.tokens) >= self.max_new_tokens:
            self.finish("length")

    def finish(self, reason: str, error: BaseException | None = None) -> None:
        """End it, and give its adapter back. Only the first end counts."""
        with self._ending:
            if self.done:
                return
            self.finish_reason, self.error = reason, error
            lease, self._lease = self._lease, None
            if lease is not None:
                lease.release()
            self._done.set()
        for function in self._callbacks:
            self._call(function)


def prompt_ids(op: str, input_ids: Any, tokenizer: Any, vocabulary: int) -> list[int]:
    """The prompt as a list of ids: from a list, a tensor ``[L]`` or ``[1, L]``, or text.

    Raises:
        TypeError: text without a tokenizer, or no list. ValueError: empty, or not ids of the vocabulary.
    """
    if isinstance(input_ids, str):
        if tokenizer is None:
            raise TypeError(f"{op}: input_ids is text, expected ids: there is no tokenizer")
        input_ids = tokenizer(input_ids)["input_ids"]
    if isinstance(input_ids, torch.Tensor):
        input_ids = input_ids.tolist()
    if not isinstance(input_ids, Iterable):
        raise TypeError(f"{op}: input_ids is {_check.shown(input_ids)}, expected a list of token ids")
    ids = list(input_ids)
    ids = ids[0] if len(ids) == 1 and isinstance(ids[0], list) else ids
    expected = f"expected token ids from 0 to {vocabulary - 1}"
    if not ids:
        raise ValueError(f"{op}: input_ids is empty, {expected}")
    for i, token in enumerate(ids):
        integer = isinstance(token, Integral) and not isinstance(token, bool)
        if not integer or not 0 <= token < vocabulary:
            raise ValueError(f"{op}: input_ids[{i}] is {_check.shown(token)}, {expected}")
    return [int(token) for token in ids]


def end_ids(model: torch.nn.Module, tokenizer: Any) -> frozenset[int]:
    """The end-of-sequence tokens that the model's configs or the tokenizer name."""
    found: set[int] = set()
    for holder in (getattr(model, "generation_config", None), getattr(model, "config", None), tokenizer):
        ids = getattr(holder, "eos_token_id", None)
        found.update(ids if isinstance(ids, list | tuple) else [ids] if isinstance(ids, int) else [])
    return frozenset(found)
