"""What clients send must not stop them: lists of prompts, fields that ask for nothing, answers that come back."""

import pytest

from tests.support.lora_checkpoints import greedy_alone
from tests.support.small_server import chat, complete, events


@pytest.mark.parametrize("stream", [False, True])
def test_several_prompts_and_choices(served, stream):
    """Each has its own answer, under its index; a prompt is counted once."""
    service, client = served
    fields = {"prompt": ["hello", [66, 1, 67], "a"], "n": 2, "max_tokens": 7, "stream_options": {"include_usage": True}}
    response = complete(
        client, "bob", stream=stream, **{k: v for k, v in fields.items() if stream or k[:6] != "stream"}
    )
    texts = ["" for _ in range(6)]
    ends = []
    for body in events(response) if stream else [response.json()]:
        for choice in body["choices"]:
            texts[choice["index"]] += choice["text"]
            ends += [choice["finish_reason"]] if choice["finish_reason"] else []
    expected = [_alone(service, text) for text in ("hello", "a b", "a")]
    assert texts == [text for text in expected for _ in range(2)]
    assert ends == ["length"] * 6
    assert body["usage"] == {"prompt_tokens": 9, "completion_tokens": 42, "total_tokens": 51}
    drawn = complete(client, "bob", n=3, temperature=1.5, max_tokens=20, seed=1).json()["choices"]
    assert len({choice["text"] for choice in drawn}) == 3
    assert (
        complete(client, "bob", temperature=1.5, max_tokens=20, seed=2).json()["choices"][0]["text"] == drawn[1]["text"]
    )


WITHOUT_EFFECT = [
    *(
        {"store": False},
        {"service_tier": "auto"},
        {"parallel_tool_calls": True},
        {"metadata": {"a": "b"}},
        {"user": "me"},
    ),
    *(
        {"prompt_cache_key": "k"},
        {"modalities": ["text"]},
        {"reasoning_effort": "low"},
        {"tools": None},
        {"unknown": None},
    ),
    *({"presence_penalty": -0.0}, {"repetition_penalty": 1.0}, {"top_k": -1}, {"min_p": 0.0}, {"ignore_eos": False}),
    *({"tool_choice": "auto"}, {"chat_template_kwargs": {"enable_thinking": False}}, {"top_p": 0}, {"n": 1}),
    *({"stop_token_ids": []}, {"stop": None}, {"skip_special_tokens": True}, {"response_format": {"type": "text"}}),
]


@pytest.mark.parametrize("fields", WITHOUT_EFFECT, ids=str)
def test_what_asks_for_nothing_is_accepted(client, fields):
    plain = chat(client, "bob", max_tokens=5).json()["choices"]
    response = chat(client, "bob", max_tokens=5, **fields)
    assert response.status_code == 200, response.text
    assert response.json()["choices"] == plain


def test_an_answer_may_be_sent_back(client):
    """As the OpenAI client dumps it, with its null fields; parts with hints for caches; an empty answer."""
    first = chat(client, "bob", max_tokens=5).json()["choices"][0]["message"]
    dumped = {**first, "refusal": None, "tool_calls": None, "function_call": None, "audio": None, "annotations": []}
    part = {"type": "text", "text": "go on", "cache_control": {"type": "ephemeral"}}

    def ask(messages):
        body = {"model": "bob", "messages": messages, "max_tokens": 5, "temperature": 0}
        return client.post("/v1/chat/completions", json=body)

    turns = [{"role": "user", "content": "abc"}, dumped, {"role": "user", "content": [part]}]
    plain = [{"role": "user", "content": "abc"}, first, {"role": "user", "content": "go on"}]
    assert ask(turns).json()["choices"] == ask(plain).json()["choices"]
    silent = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None},
        {"role": "user", "content": "b"},
    ]
    assert ask(silent).status_code == 200


def _alone(service, text):
    ids = service.tokenizer(text)["input_ids"]
    return service.tokenizer.decode(greedy_alone(service.bank, ids, "bob", 7))
