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


def test_settings_of_sampling_reach_the_draw(served):
    service, client = served

    def text(**fields):
        response = complete(client, "bob", "hello", max_tokens=20, seed=1, **{"temperature": 1.5, **fields})
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]["text"]

    greedy = text(temperature=0)
    for fields in ({"top_k": 1}, {"min_p": 1.0}, {"top_p": 0}, {"logit_bias": {}, "top_k": 1}):
        assert text(**fields) == greedy
    bias = {str(service.tokenizer("Q")["input_ids"][0]): 100}
    assert text(logit_bias=bias) == "Q" * 20
    assert len(set(text(temperature=0, repetition_penalty=1000.0))) > len(set(greedy))
    ended = [service.tokenizer(greedy[0])["input_ids"][0]]
    assert text(temperature=0, stop_token_ids=ended) == ""
    assert len(text(temperature=0, stop_token_ids=ended, min_tokens=5)) >= 5


def test_the_checkpoints_settings_stand_where_a_request_has_none(folder):
    from tests.support.models import llama
    from tests.support.small_server import serving

    model = llama()
    model.generation_config.update(top_k=1, temperature=0.7, do_sample=True, max_new_tokens=6)
    for taken in (True, False):
        with serving(folder, model=model, generation_config=taken) as (_, client):

            def ask(seed, client=client, **fields):
                body = {"model": "bob", "messages": [{"role": "user", "content": "a"}], "seed": seed, **fields}
                return client.post("/v1/chat/completions", json=body).json()

            texts = {ask(seed, max_tokens=20)["choices"][0]["message"]["content"] for seed in range(4)}
            assert (len(texts) == 1) == taken
            if taken:
                assert ask(0)["usage"]["completion_tokens"] == 6
                free = {ask(i, max_tokens=20, top_k=0)["choices"][0]["message"]["content"] for i in range(4)}
                assert len(free) > 1


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
