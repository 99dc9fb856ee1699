"""vLLM's OpenAI server with our LoRA layers, on a CPU: tenants at once, streams, loads, replacements, unloads."""

import concurrent.futures
import json

import httpx
import pytest

from tests.support import real_vllm
from tests.support.small_server import tokenizer

PROMPT = [5, 17, 3, 44, 9, 61, 30]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("vllm_server")


@pytest.fixture(scope="module")
def folders(root):
    found = real_vllm.write(root)
    tokenizer().save_pretrained(root / "base")
    return found


@pytest.fixture(scope="module")
def peft(folders):
    return real_vllm.Checker(folders)


@pytest.fixture(scope="module")
def log(root):
    return root / "server.log"


@pytest.fixture(scope="module")
def client(root, folders, log):
    started = {name: folders[name] for name in ("alice", "bob")}
    with (
        real_vllm.server(root / "base", started, log, FASTPEFT_VLLM="strict") as url,
        httpx.Client(base_url=url, timeout=120) as client,
    ):
        yield client


def asked(name, tokens=16, **fields):
    # vLLM's own extension tells the tokens, whatever they spell.
    return {
        "model": name, "prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
        "return_token_ids": True, **fields,
    }  # fmt: skip


def complete(client, name, **fields):
    response = client.post("/v1/completions", json=asked(name, **fields))
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["token_ids"]


def adapter(client, action, name, folder=None, **fields):
    path = {} if folder is None else {"lora_path": str(folder)}
    return client.post(f"/v1/{action}_lora_adapter", json={"lora_name": name, **path, **fields})


def test_the_server_says_who_serves(client, log):
    text = log.read_text()
    assert "LoRA of linear layers is served by fastpeft's kernels" in text
    assert "Using FastPunicaWrapperCPU" in text
    assert {card["id"] for card in client.get("/v1/models").json()["data"]} >= {"base", "alice", "bob"}


def test_tenants_at_once_get_what_peft_gives_each(client, peft):
    names = ["alice", "base", "bob"] * 4
    with concurrent.futures.ThreadPoolExecutor(len(names)) as pool:
        found = list(pool.map(lambda name: complete(client, name), names))
    for name, answer in zip(names, found):
        assert peft.wrong(PROMPT, answer, None if name == "base" else name) == [], name


def test_a_stream_has_the_same_tokens(client, peft):
    with client.stream("POST", "/v1/completions", json=asked("bob", stream=True)) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    tokens = [token for line in lines for token in json.loads(line)["choices"][0]["token_ids"]]
    assert len(tokens) == 16
    assert peft.wrong(PROMPT, tokens, "bob") == []


def test_adapters_come_change_and_go_while_others_are_served(client, peft, folders):
    """Each answer of a name is that of a version which it had; alice is served throughout."""
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        running = [pool.submit(complete, client, "alice", tokens=200) for _ in range(3)]
        for folder in ("carol", "bob", "carol", "alice"):
            loaded = adapter(client, "load", "live", folders[folder], load_inplace=True)
            assert loaded.status_code == 200, loaded.text
            assert peft.wrong(PROMPT, complete(client, "live"), folder) == [], folder
        assert adapter(client, "unload", "live").status_code == 200
        assert client.post("/v1/completions", json=asked("live")).status_code == 404
        for answer in running:
            assert peft.wrong(PROMPT, answer.result(), "alice") == []
    assert peft.wrong(PROMPT, complete(client, "base"), None) == []
