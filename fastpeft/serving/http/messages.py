"""The messages of a chat, and the tools that come with them, as OpenAI's clients send them."""

import json
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)

from ... import _check

_TEXT_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}


class Strict(BaseModel):
    """An object of a request: what it does not know it refuses, but for null and empty lists, which ask for nothing."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_what_asks_nothing(cls, fields: object) -> object:
        """Clients send the fields that they have, and messages back."""
        if not isinstance(fields, dict):
            return fields
        known = cls.model_fields
        return {key: value for key, value in fields.items() if key in known or not (value is None or value == [])}


def _text(value: object, info: ValidationInfo) -> object:
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


class _Called(Strict):
    name: str
    arguments: str


class ToolCall(Strict):
    """That an assistant made."""

    id: str
    type: str = Field("function", pattern="^function$")
    function: _Called


class _Function(Strict):
    name: str = Field(min_length=1)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """That the model may call."""

    type: str = Field(pattern="^function$")
    function: _Function


class Message(Strict):
    """Of a chat. What an answer's message has besides, null or empty, may come back with it."""

    model_config = ConfigDict(
        json_schema_extra={"anyOf": [{"properties": {"role": {"const": "assistant"}}}, {"required": ["content"]}]}
    )
    role: str = Field(pattern="^(system|developer|user|assistant|tool)$")
    content: Annotated[
        str,
        BeforeValidator(_text),
        WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": _TEXT_PART}]}),
    ] = ""
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _said_something(self) -> "Message":
        if self.role != "assistant" and "content" not in self.model_fields_set:
            raise ValueError("content is missing")
        if self.role != "assistant" and self.tool_calls:
            raise ValueError(f"tool_calls are an assistant's, not of the role {self.role!r}")
        return self

    @property
    def of_tools(self) -> bool:
        """Whether only a template that knows tools can show it."""
        return self.role == "tool" or bool(self.tool_calls)

    def plain(self) -> dict[str, Any]:
        """What a chat template takes."""
        plain: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            plain["tool_calls"] = [call.model_dump() for call in self.tool_calls]
            for call in plain["tool_calls"]:  # templates write them as JSON themselves
                call["function"]["arguments"] = _arguments(call["function"]["arguments"])
        if self.role == "tool":
            plain |= {"tool_call_id": self.tool_call_id, "name": self.name}
        if self.reasoning_content:
            plain["reasoning_content"] = self.reasoning_content
        return plain


def _arguments(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
