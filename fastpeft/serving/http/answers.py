"""OpenAI's responses, streams and errors."""

import logging
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import BankError, BankFull, NotFinite, QueueFull, UnknownAdapter

log = logging.getLogger("uvicorn.error")


class ApiError(Exception):
    """An answer that is no success, in OpenAI's form."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers: dict[str, str] = {} if retry_after is None else {"Retry-After": str(retry_after)}
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"

    def body(self) -> dict[str, Any]:
        """The JSON."""
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status)
        kind = kind or ("server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclass
class Piece:
    """Of one choice: what has come of it, or all of it.

    Attributes:
        text: that is certain.
        finish: why it ended, with the last piece; else None.
        logprobs: in the endpoint's form; None where they are not asked for.
        message: the parts of a chat's answer that were parsed out of its text, in place of the text; else None.
    """

    text: str = ""
    finish: str | None = None
    logprobs: dict[str, Any] | None = None
    message: dict[str, Any] | None = None


class Answer:
    """Builds the response and the stream's chunks of one request: the same id, time and model in all of them."""

    def __init__(self, model: str, chat: bool):
        self.chat = chat
        self.head: dict[str, Any] = {
            "id": ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex,
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": None,
        }

    def of_version(self, version: int | None) -> None:
        """Name the adapter's version that answers, None for the base model: each load has a number of its own."""
        if version is not None:
            self.head["system_fingerprint"] = f"{self.head['model']}:{version}"

    def whole(self, pieces: Sequence[Piece], usage: dict[str, int]) -> dict[str, Any]:
        """The response; each choice in one piece."""
        choices = []
        for index, piece in enumerate(pieces):
            message = piece.message or {"content": piece.text}
            content = {"message": {"role": "assistant", **message}} if self.chat else {"text": piece.text}
            choices.append({"index": index, **content, "logprobs": piece.logprobs, "finish_reason": piece.finish})
        return {**self.head, "choices": choices, "usage": usage}

    def chunk(
        self, piece: Piece, index: int = 0, first: bool = False, used: dict[str, int] | None = None
    ) -> dict[str, Any]:
        """Of a stream: a piece of one choice, with the tokens of all so far if that is ``used``."""
        content: dict[str, Any]
        if not self.chat:
            content = {"text": piece.text}
        elif first:
            content = {"delta": {"role": "assistant", "content": piece.text}}
        elif piece.message is not None:
            calls = piece.message.get("tool_calls", [])
            numbered = {"tool_calls": [{"index": i, **call} for i, call in enumerate(calls)]} if calls else {}
            content = {"delta": {**piece.message, **numbered}}
        else:
            content = {"delta": {"content": piece.text} if piece.text else {}}
        choice = {"index": index, **content, "logprobs": piece.logprobs, "finish_reason": piece.finish}
        return {**self._chunk([choice]), **({} if used is None else {"usage": used})}

    def usage_chunk(self, usage: dict[str, int]) -> dict[str, Any]:
        return {**self._chunk([]), "usage": usage}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return {**self.head, "object": kind, "choices": choices}


def usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


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
    if isinstance(error, NotFinite):
        return ApiError(400, str(error).removeprefix("submit: "), "model", "adapter_not_finite")
    if isinstance(error, ValueError | TypeError):
        return ApiError(400, str(error).removeprefix("submit: "), "prompt")
    if isinstance(error, BankError) and "stopping" in str(error):
        return ApiError(503, "The server is stopping", code="stopping")
    log.error("a request failed", exc_info=error)
    return ApiError(500, "The request failed", code="internal_error")
