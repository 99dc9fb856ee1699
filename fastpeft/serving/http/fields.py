"""Kinds of a request's fields: how each is read, and what it says of itself in /openapi.json."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationInfo, WithJsonSchema

_STOPS, _STOP_LENGTH = 4, 256
CHOICES = 128
# What these ask for is not served, so only the value that asks for nothing is accepted.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "suffix": (None, ""),
    "functions": (None, []),
    "function_call": (None, "auto", "none"),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "tool_choice": (None, "auto", "none"),
    # vLLM's
    "length_penalty": (None, 1, 1.0),
    "use_beam_search": (None, False),
    "skip_special_tokens": (None, True),
    "spaces_between_special_tokens": (None, True),
    "include_stop_str_in_output": (None, False),
    "priority": (None, 0),
}
# They say who asks and what for, or allow what is not done: whatever they hold, the answer is the same.
WITHOUT_EFFECT = {
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    *("request_id", "cache_salt"),
}


def _neutral(value: object, info: ValidationInfo) -> object:
    accepted = _NEUTRAL[str(info.field_name)]
    if not any(type(value) is type(a) and value == a for a in accepted):
        raise ValueError(f"{info.field_name} is not supported, expected it to be absent or {accepted[-1]!r}")
    return value


def only(name: str) -> Any:
    """A field that is accepted where it asks for nothing."""
    return Annotated[object, BeforeValidator(_neutral), WithJsonSchema({"enum": list(_NEUTRAL[name])})]


def _stops(value: object) -> object:
    stops = [value] if isinstance(value, str) else value or []
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("expected a string or a list of strings")
    if len(stops) > _STOPS or any(not 0 < len(stop) <= _STOP_LENGTH for stop in stops):
        raise ValueError(f"expected at most {_STOPS} strings of 1 to {_STOP_LENGTH} characters")
    return stops


def _biases(value: object) -> object:
    """JSON's keys are strings."""
    if not isinstance(value, dict) or not all(isinstance(key, str) and key.isdecimal() for key in value):
        raise ValueError("expected an object whose keys are token ids")
    return {int(key): bias for key, bias in value.items()}


def _prompts(value: object) -> object:
    """Always a list of prompts."""
    if isinstance(value, str) or (isinstance(value, list) and _are_ids(value)):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(each, str) or _are_ids(each) for each in value):
        raise ValueError("expected a string, a list of token ids, or a list of one of them")
    if not 0 < len(value) <= CHOICES:
        raise ValueError(f"{len(value)} prompts, expected 1 to {CHOICES}")
    return value


def _are_ids(value: object) -> bool:
    """A list of numbers, which is no list of prompts; whether they are ids of the vocabulary is asked later."""
    return isinstance(value, list) and (not value or all(isinstance(each, int) for each in value))


_STOP: dict[str, Any] = {"type": "string", "minLength": 1, "maxLength": _STOP_LENGTH}
_IDS: dict[str, Any] = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_PROMPT: dict[str, Any] = {"anyOf": [{"type": "string"}, _IDS]}
Stops = Annotated[
    list[str],
    BeforeValidator(_stops),
    WithJsonSchema({"anyOf": [{"type": "null"}, _STOP, {"type": "array", "items": _STOP, "maxItems": _STOPS}]}),
]
Bias = Annotated[dict[int, Annotated[float, Field(ge=-100, le=100)]], BeforeValidator(_biases)]
Prompts = Annotated[
    list[str | list[int]],
    BeforeValidator(_prompts),
    WithJsonSchema({"anyOf": [*_PROMPT["anyOf"], {"type": "array", "items": _PROMPT, "maxItems": CHOICES}]}),
]
