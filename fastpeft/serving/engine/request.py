"""One request for tokens: what was asked, what has come so far, how it ended."""

import threading
from collections.abc import Callable, Sequence

import torch

from ..bank.lease import Lease


class Request:
    """A handle on one request; made by ``Batcher.submit``, read and cancelled by any thread.

    Attributes:
        prompt: the input ids. adapter: its name or None.
        tokens: the new tokens so far, without the end-of-sequence token.
        finish_reason: None while it waits or runs; then "stop" (an end-of-sequence token), "length", "cancelled" or
            "error".
        error: the exception, after "error".
    """

    def __init__(
        self,
        prompt: Sequence[int],
        adapter: str | None,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        seed: int | None,
        stop_ids: frozenset[int],
        on_token: Callable[[int], object] | None,
    ):
        self.prompt, self.adapter, self.max_new_tokens = list(prompt), adapter, max_new_tokens
        self.temperature, self.top_p, self.stop_ids, self.on_token = temperature, top_p, stop_ids, on_token
        self.tokens: list[int] = []
        self.finish_reason: str | None = None
        self.error: BaseException | None = None
        self.lease: Lease | None = None
        self.overtaken = 0  # requests that came later and were let in before
        self.generator = None
        if temperature > 0:
            self.generator = torch.Generator()
            self.generator.manual_seed(self.generator.seed() if seed is None else seed)
        self._cancelled = False
        self._done = threading.Event()

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        return self._done.is_set()

    @property
    def cancelled(self) -> bool:
        """Whether ``cancel`` was called."""
        return self._cancelled

    def cancel(self) -> None:
        """End it before the next token; what has come so far stays. After the end it does nothing."""
        self._cancelled = True

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the end, at most so many seconds; whether it has come."""
        return self._done.wait(timeout)

    def result(self, timeout: float | None = None) -> list[int]:
        """Wait for the end and return the new tokens; those that had come, after ``cancel``.

        Raises:
            TimeoutError: not within so many seconds; the request goes on. Whatever ended the request in error.
        """
        if not self._done.wait(timeout):
            raise TimeoutError(f"result: the request has not ended within {timeout} s")
        if self.error is not None:
            raise self.error
        return list(self.tokens)

    def take(self, token: int) -> None:
        """Add the next token, and end where it ends. Errors of ``on_token`` are this request's alone."""
        if token in self.stop_ids:
            self.finish("stop")
            return
        self.tokens.append(token)
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
        if self._done.is_set():
            return
        self.finish_reason, self.error = reason, error
        lease, self.lease = self.lease, None
        if lease is not None:
            lease.release()
        self._done.set()


def prompt_ids(op: str, input_ids: object, tokenizer: object, vocabulary: int) -> list[int]:
    """The prompt as a list of ids: from a list, a tensor ``[L]`` or ``[1, L]``, or text.

    Raises:
        TypeError: text without a tokenizer. ValueError: empty, or not ids of the vocabulary.
    """
    if isinstance(input_ids, str):
        if tokenizer is None:
            raise TypeError(f"{op}: input_ids is text, expected ids: there is no tokenizer")
        input_ids = tokenizer(input_ids)["input_ids"]
    ids = input_ids.tolist() if isinstance(input_ids, torch.Tensor) else list(input_ids)
    ids = ids[0] if len(ids) == 1 and isinstance(ids[0], list) else ids
    wrong = [i for i in ids if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < vocabulary]
    if not ids or wrong:
        given = f"a list with {wrong[0]!r}" if wrong else "empty"
        raise ValueError(f"{op}: input_ids is {given}, expected token ids from 0 to {vocabulary - 1}")
    return ids


def end_ids(model: torch.nn.Module, tokenizer: object) -> frozenset[int]:
    """The end-of-sequence tokens that the model's configs or the tokenizer name."""
    found = set()
    for holder in (getattr(model, "generation_config", None), getattr(model, "config", None), tokenizer):
        ids = getattr(holder, "eos_token_id", None)
        found.update(ids if isinstance(ids, list | tuple) else [ids] if isinstance(ids, int) else [])
    return frozenset(found)
