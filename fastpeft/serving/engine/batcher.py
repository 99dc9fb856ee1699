"""Continuous batching: requests for different adapters join and leave a running batch at every step.

    with Batcher(bank) as batcher:
        request = batcher.submit(input_ids, adapter="alice", max_new_tokens=64, on_token=print)
        tokens = request.result()

First come, first served. A request whose adapter finds no slot waits for one; later requests that need no new slot may
overtake it, but only ``max_rows`` times. An error in one request ends that request alone.
"""

import math
import threading
from collections import deque
from collections.abc import Callable, Sequence

from torch import Tensor

from ... import _check
from ..bank.bank import AdapterBank
from ..errors import BankError, BankFull, QueueFull, UnknownAdapter
from .request import Request, end_ids, prompt_ids
from .rows import Rows
from .sampling import next_tokens

_PREFILL_TOKENS = 4096  # padded prompt tokens that are read at once between two steps


class Batcher:
    """Generates tokens for many requests on one thread of its own.

    Args:
        bank: around a causal language model of transformers, in eval mode.
        tokenizer: for prompts that are text, and its end-of-sequence token.
        max_rows: requests that run at once. max_waiting: requests that may wait, None for any number.
        max_tokens: the longest prompt and completion together; None is the model's ``max_position_embeddings``.
        max_cached: tokens that the cache may come to hold, its rows times the longest of them (they are padded to one
            length); requests wait for room. None for any number.

    Raises:
        TypeError, ValueError: naming the argument, what it is and what was expected.
    """

    def __init__(
        self,
        bank: AdapterBank,
        tokenizer: object = None,
        max_rows: int = 32,
        max_tokens: int | None = None,
        max_waiting: int | None = None,
        max_cached: int | None = None,
    ):
        if not isinstance(bank, AdapterBank):
            raise TypeError(f"Batcher: bank is {type(bank).__name__}, expected an AdapterBank")
        limits = {"max_tokens": max_tokens, "max_waiting": max_waiting, "max_cached": max_cached}
        for name, value in {"max_rows": max_rows, **limits}.items():
            if value is not None or name == "max_rows":
                _check.positive("Batcher", name, value)
        if bank.model.training:
            raise ValueError("Batcher: the bank's model is in training mode, expected model.eval()")
        config = getattr(bank.model, "config", None)
        self.bank, self.tokenizer, self.max_rows, self.max_waiting = bank, tokenizer, max_rows, max_waiting
        self.max_tokens = max_tokens or getattr(config, "max_position_embeddings", None) or 4096
        self.max_cached = max_cached or max_rows * self.max_tokens
        self.max_tokens = min(self.max_tokens, self.max_cached)
        self._vocabulary = bank.model.get_input_embeddings().num_embeddings
        self._stop_ids = end_ids(bank.model, tokenizer)
        self._rows = Rows(bank)
        self._waiting: deque[Request] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopping = self._cancelling = False

    @property
    def waiting(self) -> int:
        """Requests that have not begun."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests in the batch."""
        return len(self._rows.requests)

    def submit(
        self,
        input_ids: Sequence[int] | Tensor | str,
        adapter: str | None = None,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        on_token: Callable[[int], object] | None = None,
        stop_token_ids: Sequence[int] = (),
    ) -> Request:
        """Queue a request.

        Args:
            input_ids: the prompt, ids or (with a tokenizer) text.
            temperature: 0 is greedy. top_p: draw from the most probable tokens of so much probability together.
            seed: the same seed draws the same; None a new one.
            on_token: called with each new token on the batcher's thread, which it holds up; an exception in it ends the
                request.
            stop_token_ids: ids that end it, beside the model's own.

        Raises:
            UnknownAdapter, QueueFull, BankError (stopping), TypeError, ValueError.
        """
        prompt = prompt_ids("submit", input_ids, self.tokenizer, self._vocabulary)
        _check.positive("submit", "max_new_tokens", max_new_tokens)
        if len(prompt) + max_new_tokens > self.max_tokens:
            given = f"{len(prompt)} prompt and {max_new_tokens} new tokens"
            raise ValueError(f"submit: {given} are asked for, expected at most max_tokens={self.max_tokens} together")
        if not isinstance(temperature, int | float) or not 0 <= temperature < math.inf:
            raise ValueError(f"submit: temperature is {temperature!r}, expected a number of at least 0")
        if not isinstance(top_p, int | float) or not 0 < top_p <= 1:
            raise ValueError(f"submit: top_p is {top_p!r}, expected a number in (0, 1]")
        if adapter is not None and adapter not in self.bank:
            raise UnknownAdapter(f"submit: no adapter {adapter!r} in the bank")
        stop_ids = self._stop_ids | frozenset(stop_token_ids)
        request = Request(prompt, adapter, max_new_tokens, temperature, top_p, seed, stop_ids, on_token)
        with self._changed:
            if self._stopping:
                raise BankError("submit: the batcher is stopping")
            if self.max_waiting is not None and len(self._waiting) >= self.max_waiting:
                raise QueueFull(f"submit: {len(self._waiting)} requests wait, expected fewer than {self.max_waiting}")
            self._waiting.append(request)
            self._changed.notify_all()
        return request

    def start(self) -> "Batcher":
        """Run on a thread of its own, until ``stop``."""
        with self._changed:
            if self._thread is not None:
                raise BankError("start: the batcher is running")
            self._stopping = self._cancelling = False
            self._thread = threading.Thread(target=self._run, name="fastpeft-batcher", daemon=True)
            self._thread.start()
        return self

    def stop(self, drain: bool = True, timeout: float | None = None) -> bool:
        """Take no more requests and end: after those that are there, or (drain=False) after cancelling them.

        Returns:
            Whether it has ended within so many seconds.
        """
        with self._changed:
            self._stopping, self._cancelling = True, self._cancelling or not drain
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join(timeout)
            if thread.is_alive():
                return False
            self._thread = None
        while self._waiting:  # the batcher never ran
            self._waiting.popleft().finish("cancelled")
        return True

    def __enter__(self) -> "Batcher":
        return self.start()

    def __exit__(self, kind, *_) -> None:
        self.stop(drain=kind is None)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._rows.requests:
                    if self._stopping:
                        return
                    self._changed.wait()
            self._turn()

    def _turn(self) -> None:
        """Let requests in, and take one step with all."""
        try:
            if self._cancelling:  # here, where no request is between the queue and the rows
                for request in (*self._waiting, *self._rows.requests):
                    request.cancel()
            for request in self._rows.requests:
                if request.cancelled:
                    request.finish("cancelled")
            self._rows.leave()
            self._join(self._admit())
            if self._rows.requests:
                self._deal(self._rows.step(), self._rows.requests)
        except Exception as error:  # a step fails as a whole; who waits is not concerned
            self._rows.clear("error", error)

    def _deal(self, logits: Tensor, requests: Sequence[Request]) -> None:
        for request, token in zip(requests, next_tokens(logits, requests), strict=True):
            if request.cancelled:
                request.finish("cancelled")
            elif token is None:
                request.finish("error", BankError(f"the logits of adapter {request.adapter!r} are not numbers"))
            else:
                request.take(token)
        self._rows.leave()

    def _join(self, requests: Sequence[Request]) -> None:
        """Read the prompts together, or, if that fails, one by one to find whose fault it is."""
        if not requests:
            return
        try:
            logits = self._rows.join(requests)
        except Exception as error:
            if len(requests) == 1:
                requests[0].finish("error", error)
                return
            for request in requests:
                self._join([request])
            return
        self._deal(logits, list(requests))

    def _admit(self) -> list[Request]:
        """The requests that begin now, with leases on their adapters."""
        admitted, blocked, error = [], None, None
        with self._changed:
            waiting = tuple(self._waiting)
        for request in waiting:
            if request.cancelled:
                request.finish("cancelled")
        for request in waiting:
            if request.done:
                continue
            if not self._has_room(request, admitted):
                break
            if blocked is not None and (
                blocked.overtaken >= self.max_rows or not self._needs_no_slot(request, admitted)
            ):
                continue
            try:
                request.lease = None if request.adapter is None else self.bank._lease("submit", request.adapter)
            except BankFull as bank_full:
                blocked, error = request, bank_full
                continue
            except Exception as failure:
                request.finish("error", failure)
                continue
            if blocked is not None:
                blocked.overtaken += 1
            admitted.append(request)
        if blocked is not None and not admitted and not self.running:
            blocked.finish("error", error)  # nobody here will give a slot back
        with self._changed:
            self._waiting = deque(r for r in self._waiting if not r.done and r not in admitted)
        return admitted

    def _has_room(self, request: Request, admitted: Sequence[Request]) -> bool:
        rows = [*self._rows.requests, *admitted, request]
        read = max(len(r.prompt) for r in (*admitted, request)) * (len(admitted) + 1)
        cached = max(len(r.prompt) + r.max_new_tokens for r in rows) * len(rows)
        return len(rows) <= self.max_rows and cached <= self.max_cached and (not admitted or read <= _PREFILL_TOKENS)

    def _needs_no_slot(self, request: Request, admitted: Sequence[Request]) -> bool:
        return request.adapter is None or any(
            other.adapter == request.adapter for other in (*self._rows.requests, *admitted)
        )
