"""OpenAI's requests, as far as they are served.

What asks for something that is not served is refused, never ignored; what asks for nothing is accepted.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..engine.settings import SamplingParams
from .answers import ApiError
from .fields import CHOICES, WITHOUT_EFFECT, Bias, Prompts, Stops, only
from .messages import Message, Strict, Tool

_SEED = 2**63
_LOGPROBS = 20


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # of the length of chunks, which nobody but the client can see here
    continuous_usage_stats: bool | None = None


class GenerationRequest(Strict):
    """Fields of both endpoints. None stands for the checkpoint's generation_config, else OpenAI's default."""

    model_config = ConfigDict(
        json_schema_extra=lambda schema: schema["properties"].update({name: {} for name in sorted(WITHOUT_EFFECT)})
    )
    model: str
    max_tokens: int | None = Field(None, ge=0)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    n: int | None = Field(None, ge=1, le=CHOICES)
    seed: int | None = Field(None, ge=-_SEED, lt=_SEED)
    stop: Stops | None = None
    stop_token_ids: list[int] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logit_bias: Bias | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=1e-3, le=1e3)
    min_tokens: int | None = Field(None, ge=0)
    ignore_eos: bool | None = None
    length_penalty: only("length_penalty") = None  # type: ignore[valid-type]
    modalities: only("modalities") = None  # type: ignore[valid-type]
    use_beam_search: only("use_beam_search") = None  # type: ignore[valid-type]
    skip_special_tokens: only("skip_special_tokens") = None  # type: ignore[valid-type]
    spaces_between_special_tokens: only("spaces_between_special_tokens") = None  # type: ignore[valid-type]
    include_stop_str_in_output: only("include_stop_str_in_output") = None  # type: ignore[valid-type]
    priority: only("priority") = None  # type: ignore[valid-type]

    @model_validator(mode="before")
    @classmethod
    def _without_what_has_no_effect(cls, fields: object) -> object:
        if not isinstance(fields, dict):
            return fields
        return {key: value for key, value in fields.items() if key not in WITHOUT_EFFECT}

    def sampling(self, defaults: Mapping[str, Any], choice: int) -> SamplingParams:
        """Of one of the choices; ``defaults`` stand where the request says nothing."""

        def asked(name: str, otherwise: float) -> Any:
            value = getattr(self, name)
            return value if value is not None else defaults.get(name, otherwise)

        return SamplingParams(
            temperature=asked("temperature", 1.0),
            top_p=asked("top_p", 1.0),
            top_k=max(asked("top_k", 0), 0),
            min_p=asked("min_p", 0.0),
            # Seeds go round, so that the largest has a next.
            seed=None if self.seed is None else (self.seed + choice + _SEED) % (2 * _SEED) - _SEED,
            repetition_penalty=asked("repetition_penalty", 1.0),
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=self.logit_bias or {},
            min_tokens=self.min_tokens or 0,
            ignore_eos=bool(self.ignore_eos),
            logprobs=self.asked_logprobs,
            prompt_logprobs=self.asked_logprobs if self.echoes else None,
        )

    @property
    def asked_logprobs(self) -> int | None:
        """How many beside the token's own; None for none at all."""
        raise NotImplementedError

    @property
    def echoes(self) -> bool:
        """Whether the prompt is part of the answer."""
        return False

    @property
    def new_tokens(self) -> int | None:
        """None for as many as there is room for."""
        raise NotImplementedError


class CompletionRequest(GenerationRequest):
    """POST /v1/completions: a prompt, a text or its tokens, or a list of prompts, each with an answer of its own."""

    prompt: Prompts
    add_special_tokens: bool | None = None
    best_of: int | None = Field(None, ge=1, le=CHOICES)
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=_LOGPROBS)
    suffix: only("suffix") = None  # type: ignore[valid-type]

    @field_validator("logprobs", mode="before")
    @classmethod
    def _no_logprobs(cls, value: object) -> object:
        return None if value is False else value

    @model_validator(mode="after")
    def _served(self) -> "CompletionRequest":
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError(f"best_of is not supported, expected it to be absent or n={self.n or 1}")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens is 0, expected at least 1 without echo")
        return self

    @property
    def asked_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def echoes(self) -> bool:
        return bool(self.echo)

    @property
    def new_tokens(self) -> int | None:
        return 16 if self.max_tokens is None else self.max_tokens


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions. Without max_tokens the answer may fill the context."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, object] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=_LOGPROBS)
    tools: list[Tool] | None = None
    tool_choice: only("tool_choice") = None  # type: ignore[valid-type]
    parallel_tool_calls: bool | None = None
    functions: only("functions") = None  # type: ignore[valid-type]
    function_call: only("function_call") = None  # type: ignore[valid-type]
    response_format: only("response_format") = None  # type: ignore[valid-type]

    @model_validator(mode="after")
    def _served(self) -> "ChatRequest":
        if self.max_tokens == 0:
            raise ValueError("max_tokens is 0, expected at least 1")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is given, expected logprobs=true beside it")
        return self

    @property
    def offered_tools(self) -> list[dict[str, Any]]:
        """What the template is given."""
        if self.tool_choice == "none":
            return []
        return [tool.model_dump(exclude_none=True) for tool in self.tools or []]

    @property
    def template_variables(self) -> dict[str, object]:
        """What the chat template is given besides messages and tools."""
        effort = {} if self.reasoning_effort is None else {"reasoning_effort": self.reasoning_effort}
        return {**effort, **(self.chat_template_kwargs or {})}

    @property
    def asked_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def new_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class LoadRequest(Strict):
    """POST /v1/load_lora_adapter, as in vLLM; lora_path is relative to the served folder, pin is ours."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False
    pin: bool = False


class UnloadRequest(Strict):
    """POST /v1/unload_lora_adapter, as in vLLM."""

    lora_name: str
    lora_int_id: int | None = None


Parsed = TypeVar("Parsed", bound=BaseModel)


def parse(kind: type[Parsed], body: bytes) -> Parsed:
    """The request, or ApiError 400 that names the first wrong field."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        param = ".".join(str(part) for part in first["loc"]) or None
        message = first["msg"].removeprefix("Value error, ")
        if param is None and message.split(" ")[0].rstrip(",") in kind.model_fields:
            param = message.split(" ")[0]  # of a check that sees several fields
            raise ApiError(400, message, param) from None
        raise ApiError(400, f"{param}: {message}" if param else message, param) from None
