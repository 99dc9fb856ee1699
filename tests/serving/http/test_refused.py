"""What the server refuses: OpenAI's errors for wrong fields, bodies, keys, models and lengths."""

import json
import socket

import pytest

from tests.support.small_server import chat, complete, error, serving


@pytest.fixture(scope="module")
def client(folder):
    with serving(folder, slots=2, max_body_bytes=4096, max_tokens=64) as (_, client):
        yield client


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"best_of": 3}, "best_of"),
        ({"echo": 1}, "echo"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"suffix": "x"}, "suffix"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"logit_bias": {"x": 5}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, None),
        ({"logit_bias": {"96": 1}}, None),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 2.5}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"seed": 2**63}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": 5}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"what": 1}}, "stream_options.what"),
        ({"max_token": 5}, "max_token"),
        ({"model": None}, "model"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ["a", 5]}, "prompt"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"prompt": {"a": "b"}}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [96]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [2**70]}, None),
        ({"prompt": [True]}, None),
    ],
    ids=str,
)
def test_wrong_fields(client, fields, param):
    response = complete(client, **fields)
    error(response, 400)
    if param is not None:
        assert response.json()["error"]["param"] == param


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "hi",
        [{"role": "tool", "content": "x"}],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}],
        [{"role": "user", "content": [{"type": "image_url"}]}],
    ],
    ids=str,
)
def test_wrong_messages(client, messages):
    error(chat(client, chat_template_kwargs={"tokenize": True}), 400)
    error(client.post("/v1/chat/completions", json={"model": "base", "messages": messages}), 400)
    error(chat(client, tools=[{"type": "function"}]), 400)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"nonsense",
        b'{"model": "base", "prompt": "\xff"}',
        b'{"model": "base", "prompt": "\\ud800"}',
        b'{"model": "base", "prompt": "a", "temperature": NaN}',
        b'{"model": "base", "prompt": "a", "temperature": 1e999}',
        b"[" * 4000,
        b'{"model":' * 400,
    ],
    ids=lambda body: repr(body[:40]),
)
def test_invalid_json(client, body):
    error(client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"}), 400)


def test_what_a_web_page_may_send_unasked_is_refused(client):
    body = json.dumps({"lora_name": "x", "lora_path": "alice"})
    for kind in ("text/plain", "application/x-www-form-urlencoded", None):
        response = client.post("/v1/load_lora_adapter", content=body, headers={"Content-Type": kind} if kind else {})
        error(response, 415)
    assert "access-control-allow-origin" not in client.get("/v1/models", headers={"Origin": "http://evil"}).headers


def test_unknown_model_path_and_method(client):
    error(complete(client, "nobody"), 404, "model_not_found")
    error(complete(client, "../alice"), 404, "model_not_found")
    error(client.get("/v1/nothing"), 404)
    wrong = client.get("/v1/completions")
    error(wrong, 405)
    assert wrong.headers["allow"] == "POST"
    assert "There is no /v1/responses here" in error(client.post("/v1/responses", json={}), 404)
    error(client.post("/v1/embeddings", json={}), 404)
    error(client.get("/docs"), 404)


def test_too_large(client):
    error(complete(client, prompt="x" * 5000), 413, "body_too_large")
    long = error(complete(client, prompt="x" * 100), 400, "context_length_exceeded")
    assert "maximum context length is 64" in long
    assert "context_length_exceeded" in long
    error(complete(client, max_tokens=62), 400, "context_length_exceeded")
    assert complete(client, max_tokens=61).json()["usage"]["total_tokens"] == 64
    assert chat(client, content="x").json()["usage"]["total_tokens"] == 64  # without max_tokens, what fits


def test_a_body_without_a_length_is_cut_off_at_the_limit(client):
    """The server answers after the limit, long before the client has said that it is done."""
    host, port = client.base_url.host, client.base_url.port
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += b"Transfer-Encoding: chunked\r\n\r\n"
    with socket.create_connection((host, port), timeout=10) as sock:
        sock.sendall(head + b"1000\r\n" + b" " * 4096 + b"\r\n" + b"10\r\n" + b" " * 16 + b"\r\n")
        assert sock.recv(100).startswith(b"HTTP/1.1 413 ")


def test_api_key(folder):
    with serving(folder, api_key="secret") as (_, client):
        assert complete(client).status_code == 200
        for given in (b"", b"secret", b"Bearer wrong", b"Bearer secret2", b"Bearer \xe9", b"Basic secret"):
            header = {"Authorization": given}
            for path in ("/v1/models", "/metrics"):
                response = client.get(path, headers=header)
                error(response, 401, "invalid_api_key")
                assert response.headers["www-authenticate"].split()[0] == {"/metrics": "Basic"}.get(path, "Bearer")
            for path in ("completions", "chat/completions", "load_lora_adapter", "unload_lora_adapter"):
                error(client.post(f"/v1/{path}", json={}, headers=header), 401, "invalid_api_key")
            assert client.get("/health", headers=header).status_code == 200


def test_a_part_that_is_no_text_is_named(client):
    parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "data:,"}}]
    response = chat(client, content=parts)
    assert "part 1 is 'image_url' (str), expected {'type': 'text'" in error(response, 400)
    assert response.json()["error"]["param"] == "messages.0.content"
