"""What goes wrong at a server stays with the request, the checkpoint or the client that it is wrong of."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="FastAPI is not installed: pip install 'fastpeft[serve]'")
pytest.importorskip("uvicorn", reason="uvicorn is not installed: pip install 'fastpeft[serve]'")
pytest.importorskip("prometheus_client", reason="prometheus-client is not installed: pip install 'fastpeft[serve]'")
pytest.importorskip("httpx", reason="httpx is not installed")
pytest.importorskip("peft", reason="PEFT is not installed")

import httpx

from fastpeft import cli
from tests.support.lora_checkpoints import SETTINGS, checkpoints
from tests.support.models import llama
from tests.support.small_server import chat, complete, error, serving, tokenizer, until

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    checkpoints(llama(), root)
    return root


@pytest.fixture(scope="module")
def client(folder):
    with serving(folder, slots=2, max_body_bytes=4096, max_tokens=64) as (_, client):
        yield client


def load(client, path, name="new", **fields):
    return client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path, **fields})


def slow_text(client, **fields):
    """Open a stream that goes on for long; the response is still open, and nothing of it read."""
    fields = {"model": "base", "prompt": "abc", "max_tokens": 400, "stream": True, **fields}
    return client.stream("POST", "/v1/completions", json=fields)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 2}, "n"),
        ({"best_of": 3}, "best_of"),
        ({"echo": True}, "echo"),
        ({"logprobs": 0}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"suffix": "x"}, "suffix"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"logit_bias": {"1": 5}}, "logit_bias"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 2.5}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"seed": 2**63}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": 5}, "stop.str"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"what": 1}}, "stream_options.what"),
        ({"max_token": 5}, "max_token"),
        ({"model": None}, "model"),
        ({"prompt": None}, "prompt.str"),
        ({"prompt": ["a", "b"]}, "prompt"),
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
        [{"role": "user", "content": [{"type": "image_url"}]}],
    ],
    ids=str,
)
def test_wrong_messages(client, messages):
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
    error(client.get("/v1/completions"), 405)
    error(client.get("/docs"), 404)
    error(client.get("/openapi.json"), 404)


def test_too_large(client):
    error(complete(client, prompt="x" * 5000), 413, "body_too_large")
    error(complete(client, prompt="x" * 100), 413, "context_length_exceeded")
    error(complete(client, max_tokens=62), 413, "context_length_exceeded")
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
                assert response.headers["www-authenticate"] == "Bearer"
            for path in ("completions", "chat/completions", "load_lora_adapter", "unload_lora_adapter"):
                error(client.post(f"/v1/{path}", json={}, headers=header), 401, "invalid_api_key")
            assert client.get("/health", headers=header).status_code == 200


def damaged(folder, root):
    """Good checkpoints and, beside them, one of each kind of bad; returns those."""
    shutil.copytree(folder, root, dirs_exist_ok=True)
    for name in ("truncated", "pickled", "no_weights", "no_json", "binary_json", "bad name"):
        shutil.copytree(folder / "alice", root / name)
    weights = root / "truncated" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (root / "pickled" / "adapter_model.safetensors").rename(root / "pickled" / "adapter_model.bin")
    (root / "no_weights" / "adapter_model.safetensors").unlink()
    (root / "no_json" / "adapter_config.json").write_text("{")
    (root / "binary_json" / "adapter_config.json").write_bytes(b"\xff\xfe\x00")
    (root / "no_adapter").mkdir()
    shutil.copytree(folder / "alice", root.parent / "outside")
    (root / "linked").symlink_to(root.parent / "outside")
    (root / "linked_file").mkdir()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (root / "linked_file" / file).symlink_to(root.parent / "outside" / file)
    return {"truncated", "pickled", "no_weights", "no_json", "binary_json", "bad name", "linked", "linked_file"}


def test_bad_checkpoints_among_good_ones(folder, tmp_path):
    bad = damaged(folder, tmp_path / "adapters")
    with serving(tmp_path / "adapters", slots=2) as (_, client):
        body = client.get("/v1/models").json()
        assert {card["id"] for card in body["data"]} == {"base", *SETTINGS}
        assert set(body["errors"]) == bad
        assert "truncated" in body["errors"]["truncated"]
        assert "unpickled" in body["errors"]["pickled"]
        assert str(tmp_path) not in json.dumps(body)
        assert "refused" in error(complete(client, "pickled"), 404, "model_not_found")
        for name in SETTINGS:
            assert complete(client, name).status_code == 200
        error(load(client, "truncated"), 400, "bad_checkpoint")
        error(load(client, "truncated", "alice", load_inplace=True), 400, "bad_checkpoint")
        assert complete(client, "alice").status_code == 200


NAMES_OUT = [
    *("..", ".", "", "/", "../outside", "alice/..", "alice/../alice", "./alice", "alice/.", "alice/", "//alice"),
    *("/etc", "/etc/passwd", "~", "~root", "$HOME", "alice\x00", "alice\n", "alice\\..\\bob", "..\\outside", "C:\\"),
    *("%2e%2e/outside", "..%2foutside", "．．/outside", "file:///etc", "http://host/x", "org/../../outside"),
    *(".hidden", "a" * 5000, "a/" * 20 + "a", "alice bob", "aliсe"),
]
LINKS_OUT = ["linked", "linked/x", "linked_file", "linked_up", "linked_up/outside"]


@pytest.mark.parametrize("path", [*NAMES_OUT, *LINKS_OUT], ids=lambda path: repr(path[:30]))
def test_no_path_leads_out(zoo, path, monkeypatch):
    """Refused, the same whether it exists or not, before anything is opened."""
    client = zoo
    opened = []
    monkeypatch.setattr("fastpeft.serving.bank.bank.read_adapter", lambda *a: opened.append(a))
    error(load(client, path), 400)
    if path in NAMES_OUT:
        error(load(client, "alice", name=path), 400)
    error(client.post("/v1/unload_lora_adapter", json={"lora_name": path}), 404, "model_not_found")
    assert opened == []
    assert {card["id"] for card in client.get("/v1/models").json()["data"]} == {"base", *SETTINGS}


@pytest.fixture(scope="module")
def zoo(folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("zoo") / "adapters"
    damaged(folder, root)
    (root / ".hidden").mkdir()
    (root / "linked_up").symlink_to("..")
    for made in ("~", "$HOME", "alice bob"):
        (root / made).mkdir(exist_ok=True)
    with serving(root, slots=2) as (_, client):
        yield client


def test_a_link_inside_the_folder_is_followed(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "latest").symlink_to("alice")
    with serving(tmp_path) as (_, client):
        assert (
            complete(client, "latest", max_tokens=9).json()["choices"]
            == complete(client, "alice", max_tokens=9).json()["choices"]
        )
        error(load(client, "missing"), 404)


def test_a_bank_full_of_pinned_adapters(folder):
    with serving(folder, slots=2) as (service, client):
        for name in ("alice", "bob"):
            assert load(client, name, name, load_inplace=True, pin=True).status_code == 200
        response = complete(client, "carol")
        error(response, 503, "bank_full")
        assert response.headers["retry-after"] == "1"
        error(complete(client, "carol", stream=True), 503, "bank_full")
        error(load(client, "carol", "carol", load_inplace=True, pin=True), 503, "bank_full")
        for name in ("alice", "bob", "base"):
            assert complete(client, name).status_code == 200
        service.bank.unpin("bob")
        assert complete(client, "carol").status_code == 200


def test_full_queue(folder):
    with serving(folder, step_seconds=0.02, max_rows=1, queue=2) as (service, client):
        with slow_text(client) as first:
            until(lambda: service.batcher.running == 1)
            with ThreadPoolExecutor(8) as pool:
                waiting = [pool.submit(complete, client, "alice", max_tokens=2) for _ in range(2)]
                until(lambda: service.batcher.waiting == 2)
                refused = list(pool.map(lambda _: complete(client, "bob"), range(4)))
                for response in refused:
                    error(response, 429, "queue_full")
                    assert response.headers["retry-after"] == "1"
                first.close()
                assert [request.result(30).status_code for request in waiting] == [200, 200]
        assert complete(client, "bob").status_code == 200


def test_prompts_that_wait_for_the_tokenizer_are_bounded_too(folder):
    with serving(folder, queue=2) as (service, client), ThreadPoolExecutor(5) as pool:
        busy = threading.Event()
        service.tokenizing.submit(busy.wait)
        requests = [pool.submit(complete, client, "bob", max_tokens=1) for _ in range(5)]
        until(lambda: sum(request.done() for request in requests) == 3)
        busy.set()
        assert sorted(request.result(30).status_code for request in requests) == [200, 200, 429, 429, 429]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_row(folder, stream):
    with serving(folder, step_seconds=0.05, max_rows=1) as (service, client):
        body = json.dumps({"model": "alice", "prompt": "abc", "max_tokens": 400, "stream": stream}).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        with socket.create_connection((client.base_url.host, client.base_url.port), timeout=10) as sock:
            sock.sendall(head.encode() + b"\r\n\r\n" + body)
            if stream:
                assert b"200 OK" in sock.recv(4096)
            until(lambda: service.batcher.running == 1)
        until(lambda: service.batcher.running == 0, seconds=10)  # 400 tokens take twenty
        assert not any(adapter.leases for adapter in service.bank._slots.held if adapter is not None)
        assert complete(client, "bob", max_tokens=2).status_code == 200
        assert 'fastpeft_requests_total{adapter="alice",status="499"} 1.0' in client.get("/metrics").text


def test_an_error_in_the_middle_of_a_stream_is_an_event(folder):
    with serving(folder) as (service, client):
        calls = []

        def break_later(*_):
            calls.append(1)
            if len(calls) == 5:
                raise RuntimeError("boom at /secret/path")

        hook = service.bank.model.register_forward_pre_hook(break_later)
        text = complete(client, "alice", max_tokens=50, stream=True).text
        hook.remove()
        *_, failure, done, _ = text.split("\n\n")
        assert done == "data: [DONE]"
        assert json.loads(failure.removeprefix("data: "))["error"]["code"] == "internal_error"
        assert "secret" not in text
        assert complete(client, "alice").status_code == 200


def test_a_slow_reader_holds_up_nobody(folder):
    with serving(folder) as (service, client):
        with slow_text(client):
            assert complete(client, "bob", max_tokens=20).status_code == 200
        until(lambda: service.batcher.running == 0)


@contextlib.contextmanager
def process(folder, tmp_path, *options, **environment):
    """`fastpeft serve` as a process of its own; yields it and its address."""
    model = tmp_path / "model"
    llama().save_pretrained(model)
    tokenizer().save_pretrained(model)
    command = [sys.executable, "-m", "fastpeft.cli", "serve", model, "--adapters", folder, "--port", "0"]
    command += ["--served-model-name", "base", "--max-rank", "16", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **environment}
    made = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        said = []
        for line in made.stderr:
            said.append(line)
            if " on http://" in line:
                break
        made.said = "".join(said)
        assert said, "it said nothing"
        assert " on http://" in said[-1], made.said
        yield made, said[-1].split()[-1]
    finally:
        made.kill()
        made.communicate()


def test_sigterm_under_load(folder, tmp_path):
    """What was accepted is finished, nothing new is accepted, and the exit code is 0."""
    options = ("--max-rows", "4", "--api-key", "k")
    with process(folder, tmp_path, *options) as (server, url):
        headers = {"Authorization": "Bearer k"}
        with httpx.Client(base_url=url, headers=headers, timeout=60) as client, ThreadPoolExecutor(12) as pool:
            assert complete(client, max_tokens=1).status_code == 200
            started = threading.Barrier(13)

            def ask(i):
                with httpx.Client(base_url=url, headers=headers, timeout=60) as own:
                    own.get("/health")
                    started.wait()
                    return complete(own, ["alice", "bob", "base"][i % 3], max_tokens=300, stream=i % 2 == 0)

            requests = [pool.submit(ask, i) for i in range(12)]
            started.wait()

            def accepted():
                rows = (row.rsplit(" ", 1) for row in client.get("/metrics").text.splitlines())
                return sum(float(value) for name, value in rows if name.startswith("fastpeft_prompt_tokens_total{"))

            until(lambda: accepted() == 13 * len("abc"))
            assert not all(request.done() for request in requests)
            server.send_signal(signal.SIGTERM)
            answers = [request.result(60) for request in requests]
            assert {answer.status_code for answer in answers} == {200}
            for i, answer in enumerate(answers):
                if i % 2 == 0:
                    assert answer.text.endswith("data: [DONE]\n\n")
                else:
                    assert answer.json()["usage"]["completion_tokens"] == 300
        assert server.wait(30) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(url + "/health")


def test_sigterm_cuts_off_what_takes_too_long(folder, tmp_path):
    """Clients that never read their streams cannot keep the server up. The key may come from the environment."""
    with process(folder, tmp_path, "--drain-seconds", "1", FASTPEFT_API_KEY="k") as (server, url):
        assert httpx.get(url + "/v1/models").status_code == 401
        with httpx.Client(base_url=url, headers={"Authorization": "Bearer k"}, timeout=60) as client:
            with contextlib.ExitStack() as streams:
                for _ in range(8):
                    assert streams.enter_context(slow_text(client, max_tokens=500)).status_code == 200
                server.send_signal(signal.SIGTERM)
                assert server.wait(30) == 0


def test_serve_says_what_is_wrong(folder, tmp_path, capsys):
    assert cli.main(["serve", str(tmp_path / "none"), "--adapters", str(folder)]) == 1
    assert cli.main(["serve", "x", "--adapters", str(tmp_path / "none")]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("fastpeft serve: ") for line in (lines[0], lines[-1]))
    assert "no such folder" in lines[-1]


def test_serve_warns_and_names_bad_checkpoints(folder, tmp_path):
    damaged(folder, tmp_path / "adapters")
    with process(tmp_path / "adapters", tmp_path, "--host", "0.0.0.0") as (server, _):
        assert "without an API key" in server.said
        assert "truncated is not served" in server.said
        assert "adapters: alice, bob, carol, dave" in server.said


def test_without_the_extra_it_says_how_to_get_it(tmp_path):
    code = """
import sys
sys.modules["fastapi"] = None
from fastpeft import cli
sys.exit(cli.main(["serve", "model", "--adapters", "."]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "pip install 'fastpeft[serve]'" in done.stderr
