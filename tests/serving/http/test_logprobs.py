"""Log-probabilities and echo, in the forms that evaluations read."""

import pytest
import torch

from tests.support.small_server import chat, complete, events


def expected(service, text, name):
    """Of each token of a text but the first."""
    ids = torch.tensor([service.tokenizer(text)["input_ids"]])
    with service.bank.use([name]), torch.no_grad():
        logprobs = service.bank.model(ids).logits[0].log_softmax(-1)
    return logprobs[:-1].gather(-1, ids[0, 1:, None])[:, 0], logprobs


def test_a_prompts_likelihood_as_evaluations_ask_for_it(served):
    """Echo, logprobs and one token more, in one request for several prompts of ids."""
    service, client = served
    texts = ["hello", "a b"]
    prompts = [service.tokenizer(text)["input_ids"] for text in texts]
    body = complete(client, "bob", prompts, max_tokens=1, logprobs=1, echo=True).json()
    for text, choice in zip(texts, body["choices"], strict=True):
        found = choice["logprobs"]
        assert choice["text"].startswith(text)
        assert "".join(found["tokens"]) == choice["text"]
        assert len(found["tokens"]) == len(text) + 1
        assert found["text_offset"] == list(range(len(text) + 1))
        own, every = expected(service, text, "bob")
        assert (found["token_logprobs"][0], found["top_logprobs"][0]) == (None, None)
        torch.testing.assert_close(torch.tensor(found["token_logprobs"][1:-1]), own)
        greedy = [max(top.values()) for top in found["top_logprobs"][1:]]
        torch.testing.assert_close(torch.tensor(greedy), every.max(-1).values)
        assert found["token_logprobs"][-1] == greedy[-1]  # which was chosen greedily


def test_a_prompt_alone(client):
    choice = complete(client, "bob", "hello", max_tokens=0, echo=True, logprobs=0).json()["choices"][0]
    assert choice["text"] == "hello"
    assert len(choice["logprobs"]["tokens"]) == 5
    body = complete(client, "bob", "hello", max_tokens=3, echo=True).json()
    assert body["choices"][0]["text"].startswith("hello")
    assert len(body["choices"][0]["text"]) == 8
    assert body["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("echo", [False, True])
def test_streamed_logprobs_are_the_whole_ones(client, echo):
    fields = {"max_tokens": 7, "logprobs": 2, "echo": echo}
    whole = complete(client, "bob", "hello", **fields).json()["choices"][0]
    chunks = [event["choices"][0] for event in events(complete(client, "bob", "hello", stream=True, **fields))]
    assert "".join(chunk["text"] for chunk in chunks) == whole["text"]
    for key, value in whole["logprobs"].items():
        assert [each for chunk in chunks for each in (chunk["logprobs"] or {key: []})[key]] == value


def test_chat_logprobs(client):
    fields = {"max_tokens": 5, "logprobs": True, "top_logprobs": 3}
    choice = chat(client, "bob", **fields).json()["choices"][0]
    content = choice["logprobs"]["content"]
    assert "".join(each["token"] for each in content) == choice["message"]["content"]
    for each in content:
        assert each["bytes"] == list(each["token"].encode())
        assert each["top_logprobs"][0]["logprob"] == each["logprob"]
        assert len(each["top_logprobs"]) == 3
    streamed = [event["choices"][0] for event in events(chat(client, "bob", stream=True, **fields))]
    assert [each for chunk in streamed for each in (chunk["logprobs"] or {"content": []})["content"]] == content
    assert chat(client, "bob", max_tokens=5).json()["choices"][0]["logprobs"] is None
