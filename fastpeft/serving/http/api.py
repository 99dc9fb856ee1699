"""OpenAI's requests, responses and errors, as far as they are served. Whatever is not is refused, never ignored."""

import time
import uuid

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

_SEED = 2**63
_STOPS, _STOP_LENGTH = 4, 256
# What these ask for is not served, so only the value that asks for nothing is accepted.
_NEUTRAL = {
    "n": (None, 1),
    "best_of": (None, 1),
    "echo": (None, False),
    "suffix": (None, ""),
    "logprobs": (None, False),
    "top_logprobs": (None,),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0, 0.0),
    "frequency_penalty": (None, 0, 0.0),
    "tools": (None, []),
    "tool_choice": (None, "none"),
    "response_format": (None, {"type": "text"}),
}


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
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"

    def body(self) -> dict:
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status)
        kind = kind or ("server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Strict):
    include_usage: bool | None = None


class _Generation(_Strict):
    """Fields of both endpoints. None stands for OpenAI's default, as there."""

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-_SEED, lt=_SEED)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None  # these two say who asks and what for; they change no answer
    metadata: dict | None = None
    n: object = None
    logprobs: object = None
    logit_bias: object = None
    presence_penalty: object = None
    frequency_penalty: object = None

    @field_validator(*_NEUTRAL, check_fields=False)
    @classmethod
    def _neutral(cls, value, info):
        accepted = _NEUTRAL[info.field_name]
        if not any(type(value) is type(a) and value == a for a in accepted):
            raise ValueError(f"{info.field_name} is not supported, expected it to be absent or {accepted[-1]!r}")
        return value

    @field_validator("stop")
    @classmethod
    def _stops(cls, value):
        stops = [value] if isinstance(value, str) else value or []
        if len(stops) > _STOPS or any(not 0 < len(stop) <= _STOP_LENGTH for stop in stops):
            raise ValueError(f"expected at most {_STOPS} strings of 1 to {_STOP_LENGTH} characters")
        return stops

    @property
    def new_tokens(self) -> int | None:
        return self.max_tokens


class CompletionRequest(_Generation):
    """POST /v1/completions: one prompt, a text or its tokens."""

    prompt: str | list[int] | list[str]
    best_of: object = None
    echo: object = None
    suffix: object = None

    @field_validator("prompt")
    @classmethod
    def _one_prompt(cls, value):
        if isinstance(value, list) and value and isinstance(value[0], str):
            if len(value) > 1:
                raise ValueError(f"a list of {len(value)} prompts is not supported, expected one prompt a request")
            return value[0]
        return value

    @property
    def new_tokens(self) -> int | None:
        return self.max_tokens or 16


class TextPart(_Strict):
    type: str
    text: str

    @field_validator("type")
    @classmethod
    def _text(cls, value):
        if value != "text":
            raise ValueError(f"{value!r} is not supported, expected 'text'")
        return value


class Message(_Strict):
    role: str = Field(pattern="^(system|developer|user|assistant)$")
    content: str | list[TextPart]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """What a chat template takes."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text}


class ChatRequest(_Generation):
    """POST /v1/chat/completions. Without max_tokens the answer may fill the context."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    top_logprobs: object = None
    tools: object = None
    tool_choice: object = None
    response_format: object = None

    @property
    def new_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class LoadRequest(_Strict):
    """POST /v1/load_lora_adapter, as in vLLM; lora_path is relative to the served folder, pin is ours."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False
    pin: bool = False


class UnloadRequest(_Strict):
    """POST /v1/unload_lora_adapter, as in vLLM."""

    lora_name: str
    lora_int_id: int | None = None


def parse(kind: type[BaseModel], body: bytes) -> BaseModel:
    """The request, or ApiError 400 that names the first wrong field."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        param = ".".join(str(part) for part in first["loc"]) or None
        message = first["msg"].removeprefix("Value error, ")
        raise ApiError(400, f"{param}: {message}" if param else message, param) from None


class Answer:
    """Builds the response and the stream's chunks of one request: the same id, time and model in all of them."""

    def __init__(self, model: str, chat: bool):
        self.chat = chat
        self.head = {
            "id": ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex,
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, text: str, finish: str, usage: dict) -> dict:
        content = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": finish}
        return {**self.head, "choices": [choice], "usage": usage}

    def chunk(self, text: str, finish: str | None, first: bool = False) -> dict:
        if not self.chat:
            content = {"text": text}
        elif first:
            content = {"delta": {"role": "assistant", "content": text}}
        else:
            content = {"delta": {"content": text} if text else {}}
        return self._chunk([{"index": 0, **content, "logprobs": None, "finish_reason": finish}])

    def usage_chunk(self, usage: dict) -> dict:
        return {**self._chunk([]), "usage": usage}

    def _chunk(self, choices: list) -> dict:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return {**self.head, "object": kind, "choices": choices}


def usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
