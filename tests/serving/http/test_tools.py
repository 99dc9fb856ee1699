"""Tools go through the template and come back by the tokenizer's own parsing, or are refused."""

import json

import pytest

from tests.support.small_server import TEMPLATE, chat, error, events, serving, tokenizer

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
KNOWS_TOOLS = (
    "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}"
    "#{{ c.function.name }} {{ c.function.arguments | tojson }}#{% endfor %}{% endfor %}<a>"
)


class Parsing:
    """A tokenizer with a parser: whatever the model writes is text, then a call of add with the number of tokens."""

    def __new__(cls, reads=True):
        made = tokenizer(KNOWS_TOOLS)
        made.response_template = {"start_anchor": "<a>"}

        def parse_response(response, prefix=None, tools=None):
            if not reads:
                raise ValueError("no message")
            assert prefix.endswith("<a>")
            assert tools == TOOLS
            call = {"type": "function", "function": {"name": "add", "arguments": {"n": len(response)}}}
            return {"role": "assistant", "content": "text", "thinking": "so", "tool_calls": [call, call]}

        made.parse_response = parse_response
        return made


def test_calls_are_parsed(folder):
    with serving(folder, tokens=Parsing()) as (_, client):
        choice = chat(client, "bob", max_tokens=5, tools=TOOLS).json()["choices"][0]
        message = choice["message"]
        assert (message["content"], message["reasoning_content"]) == ("text", "so")
        assert [call["function"] for call in message["tool_calls"]] == [{"name": "add", "arguments": '{"n": 5}'}] * 2
        assert len({call["id"] for call in message["tool_calls"]}) == 2
        assert choice["finish_reason"] == "length"
        single = chat(client, "bob", max_tokens=5, tools=TOOLS, parallel_tool_calls=False).json()["choices"][0]
        assert len(single["message"]["tool_calls"]) == 1
        chunks = events(chat(client, "bob", max_tokens=5, tools=TOOLS, stream=True))
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        assert [call["index"] for delta in deltas for call in delta.get("tool_calls", [])] == [0, 1]
        turns = [
            {"role": "user", "content": "abc"},
            message,
            *({"role": "tool", "content": "3", "tool_call_id": call["id"]} for call in message["tool_calls"]),
        ]
        body = {"model": "bob", "messages": turns, "tools": TOOLS, "tool_choice": "none", "max_tokens": 3}
        answer = client.post("/v1/chat/completions", json=body).json()
        prompt = '<user>abc<assistant>text#add {"n": 5}##add {"n": 5}#<tool>3<tool>3<a>'
        assert answer["usage"]["prompt_tokens"] == len(prompt)
        assert "tool_calls" not in answer["choices"][0]["message"]


def test_the_end_by_a_call_says_so(folder):
    with serving(folder, tokens=Parsing()) as (service, client):
        first = chat(client, "bob", max_tokens=1, tools=TOOLS, logprobs=True).json()["choices"][0]
        token = service.tokenizer(first["logprobs"]["content"][0]["token"])["input_ids"][0]
        ended = chat(client, "bob", max_tokens=5, tools=TOOLS, stop_token_ids=[token]).json()["choices"][0]
        assert ended["finish_reason"] == "tool_calls"
        assert json.loads(ended["message"]["tool_calls"][0]["function"]["arguments"]) == {"n": 0}


def test_what_the_parser_cannot_read_is_text(folder):
    with serving(folder, tokens=Parsing(reads=False)) as (_, client):
        choice = chat(client, "bob", max_tokens=5, tools=TOOLS).json()["choices"][0]
        assert len(choice["message"]["content"]) == 5


@pytest.mark.parametrize("template", [None, TEMPLATE, KNOWS_TOOLS])
def test_without_a_way_to_tell_calls_from_text_tools_are_refused(folder, template):
    with serving(folder, template=template) as (_, client):
        assert "tools: they are not served" in error(chat(client, tools=TOOLS), 400)
        assert chat(client, tools=TOOLS, tool_choice="none", max_tokens=1).status_code == 200
        assert "tool_choice" in error(chat(client, tools=TOOLS, tool_choice="required"), 400)
        turns = [{"role": "user", "content": "a"}, {"role": "tool", "content": "3", "tool_call_id": "x"}]
        body = {"model": "bob", "messages": turns, "max_tokens": 1}
        status = client.post("/v1/chat/completions", json=body).status_code
        assert status == (200 if template is KNOWS_TOOLS else 400)


def test_transformers_own_parser_reads_the_calls():
    """By a response_template, from tokens, as an answer that was generated."""
    import inspect

    from transformers import PreTrainedTokenizerFast

    from fastpeft.serving.http.api import ChatRequest
    from fastpeft.serving.http.prompts import Prompts

    if "prefix" not in inspect.signature(getattr(PreTrainedTokenizerFast, "parse_response", len)).parameters:
        pytest.skip("this transformers has no response_template")
    made = tokenizer(KNOWS_TOOLS)
    call = {"open": "[[", "close": "]]", "content": "json", "repeats": True}
    call["transform"] = {"type": "function", "function": "{content}"}
    made.response_template = {"start_anchor": "<a>", "fields": {"content": {}, "tool_calls": call}}
    messages = [{"role": "user", "content": "x"}]
    prompt = Prompts(made).of_chat(ChatRequest(model="m", messages=messages, tools=TOOLS))
    assert prompt.text == "[add]<user>x<a>"

    def read(text):
        return prompt.parse(made(text)["input_ids"])

    message = read('so [[{"name": "add", "arguments": {"n": 1}}]]')
    assert message["content"] == "so"
    assert [each["function"] for each in message["tool_calls"]] == [{"name": "add", "arguments": '{"n": 1}'}]
    assert read("only text") == {"content": "only text"}
    assert read("so [[no JSON]]") is None
