"""OpenAI's requests, as far as they are served.

What asks for something that is not served is refused, never ignored; what asks for nothing is accepted.
"""

from typing import TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from ... import _check
from .answers import ApiError

_SEED = 2**63
_STOPS, _STOP_LENGTH = 4, 256
_CHOICES = 128
# What these ask for is not served, so only the value that asks for nothing is accepted.
_NEUTRAL = {
    "best_of": (None, 1),
    "echo": (None, False),
    "suffix": (None, ""),
    "logprobs": (None, False),
    "top_logprobs": (None,),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0, 0.0),
    "frequency_penalty": (None, 0, 0.0),
    "tools": (None, []),
    "tool_choice": (None, "auto", "none"),
    "functions": (None, []),
    "function_call": (None, "auto", "none"),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    # vLLM's
    "top_k": (None, 0, -1),
    "min_p": (None, 0, 0.0),
    "min_tokens": (None, 0),
    "repetition_penalty": (None, 1, 1.0),
    "length_penalty": (None, 1, 1.0),
    "ignore_eos": (None, False),
    "use_beam_search": (None, False),
    "skip_special_tokens": (None, True),
    "spaces_between_special_tokens": (None, True),
    "include_stop_str_in_output": (None, False),
    "priority": (None, 0),
}
# They say who asks and what for, or allow what is not done: whatever they hold, the answer is the same.
_WITHOUT_EFFECT = {
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    *("parallel_tool_calls", "request_id", "cache_salt"),
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_what_asks_nothing(cls, fields: object) -> object:
        """Null asks for nothing, whatever it is under: clients send the fields that they have, and messages back."""
        if not isinstance(fields, dict):
            return fields
        known = cls.model_fields
        return {key: value for key, value in fields.items() if key in known or not (value is None or value == [])}


class StreamOptions(_Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # of the length of chunks, which nobody but the client can see here
    continuous_usage_stats: object = None

    @field_validator("continuous_usage_stats")
    @classmethod
    def _neutral(cls, value: object) -> object:
        if value not in (None, False):
            raise ValueError("is not supported, expected it to be absent or False")
        return value


class _Generation(_Strict):
    """Fields of both endpoints. None stands for OpenAI's default, as there."""

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    n: int | None = Field(None, ge=1, le=_CHOICES)
    seed: int | None = Field(None, ge=-_SEED, lt=_SEED)
    stop: list[str] | None = None
    stop_token_ids: list[int] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: object = None
    logit_bias: object = None
    presence_penalty: object = None
    frequency_penalty: object = None
    modalities: object = None
    top_k: object = None
    min_p: object = None
    min_tokens: object = None
    repetition_penalty: object = None
    length_penalty: object = None
    ignore_eos: object = None
    use_beam_search: object = None
    skip_special_tokens: object = None
    spaces_between_special_tokens: object = None
    include_stop_str_in_output: object = None
    priority: object = None

    @model_validator(mode="before")
    @classmethod
    def _without_what_has_no_effect(cls, fields: object) -> object:
        if not isinstance(fields, dict):
            return fields
        return {key: value for key, value in fields.items() if key not in _WITHOUT_EFFECT}

    @field_validator(*_NEUTRAL, check_fields=False)
    @classmethod
    def _neutral(cls, value: object, info: ValidationInfo) -> object:
        accepted = _NEUTRAL[str(info.field_name)]
        if not any(type(value) is type(a) and value == a for a in accepted):
            raise ValueError(f"{info.field_name} is not supported, expected it to be absent or {accepted[-1]!r}")
        return value

    @field_validator("stop", mode="before")
    @classmethod
    def _stops(cls, value: object) -> object:
        stops = [value] if isinstance(value, str) else value or []
        if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
            raise ValueError("expected a string or a list of strings")
        if len(stops) > _STOPS or any(not 0 < len(stop) <= _STOP_LENGTH for stop in stops):
            raise ValueError(f"expected at most {_STOPS} strings of 1 to {_STOP_LENGTH} characters")
        return stops

    @property
    def new_tokens(self) -> int | None:
        return self.max_tokens


class CompletionRequest(_Generation):
    """POST /v1/completions: a prompt, a text or its tokens, or a list of prompts, each with an answer of its own."""

    prompt: list[str | list[int]]
    add_special_tokens: bool | None = None
    best_of: object = None
    echo: object = None
    suffix: object = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _prompts(cls, value: object) -> object:
        """Always a list of prompts."""
        if isinstance(value, str) or (isinstance(value, list) and _are_ids(value)):
            value = [value]
        if not isinstance(value, list) or not all(isinstance(each, str) or _are_ids(each) for each in value):
            raise ValueError("expected a string, a list of token ids, or a list of one of them")
        if not 0 < len(value) <= _CHOICES:
            raise ValueError(f"{len(value)} prompts, expected 1 to {_CHOICES}")
        return value

    @property
    def new_tokens(self) -> int | None:
        return self.max_tokens or 16


class Message(_Strict):
    """Of a chat. What an answer's message has besides, null or empty, may come back with it."""

    role: str = Field(pattern="^(system|developer|user|assistant)$")
    content: str = ""
    name: str | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _text(cls, value: object, info: ValidationInfo) -> object:
        """A text, or the texts of its parts, one after the other; an assistant may have said nothing."""
        if value is None and info.data.get("role") == "assistant":
            return ""
        if isinstance(value, str):
            return value
        if not isinstance(value, list):
            raise ValueError("expected a string or a list of parts")
        for i, part in enumerate(value):
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, dict) else part
                raise ValueError(f"part {i} is {_check.shown(kind)}, expected {{'type': 'text', 'text': ...}}")
        return "".join(part["text"] for part in value)

    @model_validator(mode="after")
    def _said_something(self) -> "Message":
        if self.role != "assistant" and "content" not in self.model_fields_set:
            raise ValueError("content is missing")
        return self

    def plain(self) -> dict[str, str]:
        """What a chat template takes."""
        return {"role": self.role, "content": self.content}


class ChatRequest(_Generation):
    """POST /v1/chat/completions. Without max_tokens the answer may fill the context."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, object] | None = None
    top_logprobs: object = None
    tools: object = None
    tool_choice: object = None
    functions: object = None
    function_call: object = None
    response_format: object = None

    @property
    def template_variables(self) -> dict[str, object]:
        """What the chat template is given besides the messages."""
        effort = {} if self.reasoning_effort is None else {"reasoning_effort": self.reasoning_effort}
        return {**effort, **(self.chat_template_kwargs or {})}

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


def _are_ids(value: object) -> bool:
    """A list of numbers, which is no list of prompts; whether they are ids of the vocabulary is asked later."""
    return isinstance(value, list) and (not value or all(isinstance(each, int) for each in value))


Parsed = TypeVar("Parsed", bound=BaseModel)


def parse(kind: type[Parsed], body: bytes) -> Parsed:
    """The request, or ApiError 400 that names the first wrong field."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        param = ".".join(str(part) for part in first["loc"]) or None
        message = first["msg"].removeprefix("Value error, ")
        raise ApiError(400, f"{param}: {message}" if param else message, param) from None
