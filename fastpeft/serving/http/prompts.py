"""From what a request holds to token ids: texts, chat templates, tools."""

import inspect
import json
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .answers import ApiError
from .api import ChatRequest, CompletionRequest

NEXT_USER = "\nuser:"


@dataclass(frozen=True)
class Prompt:
    """Ready to be read by the model.

    Attributes:
        ids: the tokens.
        text: what they stand for.
        stops: strings that end the answer, besides those of the request.
        parse: of a chat with tools, what makes a message of an answer's tokens, or None of what it cannot read.
    """

    ids: list[int]
    text: str
    stops: tuple[str, ...] = ()
    parse: Callable[[Sequence[int]], dict[str, Any] | None] | None = None


class Prompts:
    """Makes them with one tokenizer, on one thread at a time.

    Args:
        tokenizer: of transformers.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._reserved = frozenset(inspect.signature(tokenizer.apply_chat_template).parameters) - {"tools"}

    def of_completion(self, request: CompletionRequest) -> list[Prompt]:
        """One for each of the request's prompts."""
        special = request.add_special_tokens is not False
        made = []
        for each in request.prompt:
            if isinstance(each, str):
                made.append(Prompt(self._ids(each, special), each))
            else:
                made.append(Prompt(each, self._decoded(each) if request.echo else ""))
        return made

    def of_chat(self, request: ChatRequest) -> Prompt:
        """Through the template. Raises ApiError 400."""
        messages = [message.plain() for message in request.messages]
        tools = request.offered_tools
        if not self._tokenizer.chat_template:
            if tools or any(message.of_tools for message in request.messages):
                raise _no_tools("has no chat template")
            text = plain_chat(messages)
            return Prompt(self._ids(text), text, (NEXT_USER,))
        self._check(request, tools)
        variables = {**request.template_variables, **({"tools": tools} if tools else {})}
        try:
            text = self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False, **variables
            )
        except Exception as error:  # a template may refuse what it likes: roles that do not alternate, a system message
            raise ApiError(400, f"messages: the chat template refuses them: {error}", "messages") from None
        prompt = self._ids(text, special=False)
        if not tools:
            return Prompt(prompt, text)
        single = request.parallel_tool_calls is False
        return Prompt(prompt, text, parse=lambda tokens: self._message(tokens, text, tools, single))

    def _check(self, request: ChatRequest, tools: list[dict[str, Any]]) -> None:
        reserved = sorted((self._reserved | {"tools"}) & request.template_variables.keys())
        if reserved:
            raise ApiError(
                400, f"chat_template_kwargs: {reserved[0]!r} is not the client's to set", "chat_template_kwargs"
            )
        if not tools and not any(message.of_tools for message in request.messages):
            return
        if "tools" not in self._tokenizer.get_chat_template(tools=tools or None):
            raise _no_tools("has a chat template that takes none")
        if tools and not getattr(self._tokenizer, "response_template", None):
            raise _no_tools("has no response_template, by which its calls could be told from text")

    def _message(
        self, tokens: Sequence[int], prompt: str, tools: list[dict[str, Any]], single: bool
    ) -> dict[str, Any] | None:
        try:
            parsed = self._tokenizer.parse_response(list(tokens), prefix=prompt, tools=tools)
            calls = [_call(each) for each in parsed.get("tool_calls") or []]
        except Exception:  # the model has written what the parser does not take
            return None
        message: dict[str, Any] = {"content": parsed.get("content") or None}
        if calls:
            message["tool_calls"] = calls[:1] if single else calls
        thought = parsed.get("reasoning_content") or parsed.get("thinking")
        return {**message, "reasoning_content": thought} if thought else message

    def _ids(self, text: str, special: bool = True) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=special)["input_ids"])

    def _decoded(self, ids: list[int]) -> str:
        try:
            return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        except (OverflowError, TypeError, IndexError):  # no ids of the vocabulary, as submit will say
            return ""


def _call(parsed: dict[str, Any]) -> dict[str, Any]:
    function = parsed.get("function", parsed)
    arguments = function.get("arguments", {})
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    made = {"name": str(function["name"]), "arguments": text}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": made}


def _no_tools(why: str) -> ApiError:
    return ApiError(400, f"tools: they are not served, the model's tokenizer {why}", "tools")


def plain_chat(messages: list[dict[str, Any]]) -> str:
    """The prompt of a chat where the tokenizer has no template: ``role: content`` lines, then ``assistant:``.

    The answer then also ends where the next line would begin with ``user:``.
    """
    return "".join(f"{message['role']}: {message['content']}\n" for message in messages) + "assistant:"
