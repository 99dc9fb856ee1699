"""Continuous batching: requests for different adapters join and leave a running batch at every step.

    with Batcher(bank) as batcher:
        request = batcher.submit(input_ids, adapter="alice", max_new_tokens=64, on_token=print)
        tokens = request.result()

Adapters take turns, and within one it is first come, first served: however many requests one has, another's first
begins in the next step, for which a row of the first is put out for a while. A request whose adapter finds no slot
waits for one; later requests that need no new slot may overtake it, but only ``max_rows`` times. An error in one
request ends that request alone, in a step too.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ... import _check
from ..bank.bank import AdapterBank
from ..errors import BankError, QueueFull, UnknownAdapter
from .admission import Admission
from .request import Request, end_ids, prompt_ids
from .rows import make_rows
from .scoring import score_prompts
from .settings import SamplingParams, one_of
from .steps import Steps


class Batcher:
    """Generates tokens for many requests on one thread of its own, between ``start`` and ``stop`` or in a ``with``.

    Args:
        bank: around a causal language model of transformers, in eval mode.
        tokenizer: of transformers, for prompts that are text, and for its end-of-sequence token.
        max_rows: how many requests run at once.
        max_tokens: of the longest prompt and completion together; None is the model's ``max_position_embeddings``.
        max_waiting: how many requests may wait; None for any number.
        max_cached: tokens that the cache may come to hold, in whole blocks; a padded one holds rows times the longest
            of them. Requests wait for room. None is ``max_rows`` times ``max_tokens``, or, if that is less, what fits
            into 80 % of a GPU's free memory, or 25 % of the host's where the model is on the CPU.
        stall_seconds: how long a step may take before ``problem`` calls it stuck.
        weights: by adapter's name, None for the bare model: how many of its requests begin for one of an adapter whose
            weight is 1, as one without a weight has, while both have requests that wait.
        adapter_rows: how many requests of one adapter run at once; None for ``max_rows``.
        adapter_waiting: how many requests of one adapter may wait; None for any number.

    Attributes:
        bank: as given.
        tokenizer: as given.
        max_rows: as given.
        max_tokens: as given, or the model's; at most ``max_cached``.
        max_waiting, adapter_waiting: as given.
        max_cached: as given, or what None stands for.

    Raises:
        TypeError: ``bank`` is no AdapterBank.
        ValueError: a bound is no integer of at least 1, the model is in training mode, or rows cannot join and leave
            its kind of cache.
    """

    def __init__(
        self,
        bank: AdapterBank,
        tokenizer: Any = None,
        max_rows: int = 32,
        max_tokens: int | None = None,
        max_waiting: int | None = None,
        max_cached: int | None = None,
        stall_seconds: float = 120.0,
        weights: Mapping[str | None, float] | None = None,
        adapter_rows: int | None = None,
        adapter_waiting: int | None = None,
    ):
        if not isinstance(bank, AdapterBank):
            raise TypeError(f"Batcher: bank is {_check.shown(bank)}, expected an AdapterBank")
        limits = {"max_tokens": max_tokens, "max_waiting": max_waiting, "max_cached": max_cached}
        limits |= {"adapter_rows": adapter_rows, "adapter_waiting": adapter_waiting}
        _check.positive("Batcher", "max_rows", max_rows)
        for name, value in limits.items():
            if value is not None:
                _check.positive("Batcher", name, value)
        for adapter, weight in (weights or {}).items():
            if not isinstance(weight, int | float) or not 0 < weight < float("inf"):
                given = f"weights[{adapter!r}] is {_check.shown(weight)}"
                raise ValueError(f"Batcher: {given}, expected a finite number above 0")
        if bank.model.training:
            raise ValueError("Batcher: the bank's model is in training mode, expected model.eval()")
        config = getattr(bank.model, "config", None)
        self.bank, self.tokenizer, self.max_rows, self.max_waiting = bank, tokenizer, max_rows, max_waiting
        self.adapter_waiting = adapter_waiting
        self.max_tokens = max_tokens or getattr(config, "max_position_embeddings", None) or 4096
        self._rows, self.max_cached = make_rows(bank, max_rows, self.max_tokens, max_cached)
        self.max_tokens = min(self.max_tokens, self.max_cached)
        model: Any = bank.model
        self._vocabulary: int = model.get_input_embeddings().num_embeddings
        self._stop_ids = end_ids(bank.model, tokenizer)
        self._steps = Steps(self._rows)
        self._admission = Admission(bank, self._rows, max_rows, adapter_rows or max_rows, weights or {})
        self._stall_seconds = stall_seconds
        self._began: float | None = None  # the turn that runs
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
        sampling: SamplingParams | None = None,
    ) -> Request:
        """Queue a request.

        Args:
            input_ids: the prompt: a list of ids, a tensor ``[L]`` or ``[1, L]``, or with a tokenizer text.
            adapter: its name, or None for the bare model.
            max_new_tokens: the most that are generated.
            temperature: divides the logits; 0 is greedy, as is what float32 cannot tell from it.
            top_p: draw from the most probable tokens that have so much probability together; 1 is all, 0 the first.
            seed: the same seed draws the same; None draws a new one.
            on_token: called with each new token on the batcher's thread, which it holds up; an exception in it ends the
                request.
            stop_token_ids: ids that end it, beside the model's own.
            sampling: every setting of sampling, in place of ``temperature``, ``top_p`` and ``seed``.

        Returns:
            The handle, to wait on and to cancel.

        Raises:
            UnknownAdapter: no adapter has that name.
            QueueFull: ``max_waiting`` requests wait, and one of this adapter among them; or ``adapter_waiting`` of it.
            BankError: the batcher is stopping.
            TypeError: text without a tokenizer.
            ValueError: another argument is out of its range, or the request is longer than ``max_tokens``.
        """
        prompt = prompt_ids("submit", input_ids, self.tokenizer, self._vocabulary)
        _check.positive("submit", "max_new_tokens", max_new_tokens)
        if len(prompt) + max_new_tokens > self.max_tokens:
            given = f"{len(prompt)} prompt and {max_new_tokens} new tokens"
            raise ValueError(f"submit: {given} are asked for, expected at most max_tokens={self.max_tokens} together")
        sampling = one_of(sampling, temperature, top_p, seed, self._vocabulary)
        if adapter is not None and adapter not in self.bank:
            known = ", ".join(self.bank.names()[:8]) or "none"
            raise UnknownAdapter(f"submit: no adapter {adapter!r}, expected one of those loaded: {known}")
        stop_ids = frozenset(stop_token_ids) | (frozenset() if sampling.ignore_eos else self._stop_ids)
        request = Request(prompt, adapter, max_new_tokens, sampling, stop_ids, on_token)
        with self._changed:
            if self._stopping:
                raise BankError("submit: the batcher is stopping")
            self._check_queue(adapter)
            self._waiting.append(request)
            self._changed.notify_all()
        return request

    def _check_queue(self, adapter: str | None) -> None:
        """Refuse one request too many; a crowd of one adapter's does not close the queue to another's first."""
        own = sum(request.adapter == adapter for request in self._waiting)
        if self.max_waiting is not None and own and len(self._waiting) >= self.max_waiting:
            raise QueueFull(f"submit: {len(self._waiting)} requests wait, expected fewer than {self.max_waiting}")
        if self.adapter_waiting is not None and own >= self.adapter_waiting:
            given = f"{own} requests of adapter {adapter!r} wait"
            raise QueueFull(f"submit: {given}, expected fewer than {self.adapter_waiting}")

    def explain(self) -> str:
        """Which cache the batch runs over, and why not over a paged one where it does not."""
        return f"{type(self.bank.model).__name__}: {self._rows.kind} a cache of {self.max_cached} tokens"

    def start(self) -> "Batcher":
        """Run on a thread of its own, until ``stop``.

        Returns:
            The batcher.

        Raises:
            BankError: it runs already.
        """
        with self._changed:
            if self._thread is not None:
                raise BankError("start: the batcher is running")
            self._stopping = self._cancelling = False
            self._thread = threading.Thread(target=self._run, name="fastpeft-batcher", daemon=True)
            self._thread.start()
        return self

    def stop(self, drain: bool = True, timeout: float | None = None) -> bool:
        """Take no more requests, and end.

        Args:
            drain: finish the requests that are there; False cancels them.
            timeout: in seconds, how long to wait for the end; None for as long as it takes.

        Returns:
            Whether it has ended in that time.
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

    def problem(self) -> str | None:
        """Why no request can be served, or None: the thread has ended, a step is stuck, or every forward fails."""
        thread = self._thread
        if thread is None or not thread.is_alive():
            return "the batcher does not run"
        began = self._began
        if began is not None and time.monotonic() - began > self._stall_seconds:
            return f"the step that runs began {time.monotonic() - began:.0f} s ago"
        broken = self._steps.broken
        return None if broken is None else f"the model's forward fails ({type(broken).__name__})"

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    while not self._waiting and not self._rows.requests:
                        if self._stopping:
                            return
                        self._changed.wait()
                self._turn()
        except BaseException as error:  # nobody may wait for a thread that is no more
            self._rows.clear("error", error)
            with self._changed:
                while self._waiting:
                    self._waiting.popleft().finish("error", error)
            raise

    def _turn(self) -> None:
        """Let requests in, and take one step with all."""
        self._began = time.monotonic()
        try:
            if self._cancelling:  # here, where no request is between the queue and the rows
                for request in (*self._waiting, *self._rows.requests):
                    request.cancel()
            self._steps.end_cancelled()
            self._steps.turn(self._admit())
        except Exception as error:  # not a forward's, which ends its own rows alone; who waits is not concerned
            self._rows.clear("error", error)
        self._began = None

    def _admit(self) -> list[Request]:
        """The requests that begin now, with leases on their adapters."""
        with self._changed:
            waiting = tuple(self._waiting)
        for request in waiting:
            if request.cancelled:
                request.finish("cancelled")
        admitted, put_out = self._admission.admit(waiting)
        for request in put_out:
            self._rows.put_out(request)
        admitted = score_prompts(self.bank, admitted)
        with self._changed:
            stay = (r for r in self._waiting if not r.done and r not in admitted)
            self._waiting = deque((*put_out, *stay))
        return admitted
