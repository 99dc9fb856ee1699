"""A server around the small model, whose tokens are single characters, and what its clients say."""

import contextlib
import json
import shutil
import time

import pytest

# A test file that imports this one is skipped where a package is missing.
pytest.importorskip("fastapi", reason="FastAPI is not installed: pip install 'fastpeft[serve]'")
pytest.importorskip("uvicorn", reason="uvicorn is not installed: pip install 'fastpeft[serve]'")
pytest.importorskip("prometheus_client", reason="prometheus-client is not installed: pip install 'fastpeft[serve]'")
pytest.importorskip("httpx", reason="httpx is not installed")
pytest.importorskip("peft", reason="PEFT is not installed")

import httpx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastpeft.serving.http.server import Door, background
from fastpeft.serving.http.service import Limits, Service
from tests.support.batching import until as until
from tests.support.models import VOCAB, llama

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


def tokenizer(template=TEMPLATE):
    """Ids are the printable characters of ASCII, and one that is not."""
    vocabulary = {chr(31 + i): i for i in range(VOCAB)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    made = PreTrainedTokenizerFast(tokenizer_object=made)
    made.chat_template = template
    return made


@contextlib.contextmanager
def serving(adapters, api_key=None, template=TEMPLATE, step_seconds=0.0, door=None, tokens=None, model=None, **limits):
    """Yields the service and a client. Every forward takes ``step_seconds`` longer than it would."""
    model = model or llama()
    if step_seconds:
        model.register_forward_pre_hook(lambda *_: time.sleep(step_seconds))
    service = Service(model, tokens or tokenizer(template), adapters, "base", Limits(**{"max_rank": 16, **limits}))
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    with (
        background(service, door or Door(api_key)) as url,
        httpx.Client(base_url=url, headers=headers, timeout=60) as client,
    ):
        yield service, client


def complete(client, model="base", prompt="abc", **fields):
    return client.post("/v1/completions", json={"model": model, "prompt": prompt, "temperature": 0, **fields})


def chat(client, model="base", content="abc", **fields):
    messages = [{"role": "user", "content": content}]
    return client.post("/v1/chat/completions", json={"model": model, "messages": messages, "temperature": 0, **fields})


def events(response):
    """The JSON of each event; the stream must be exactly `data: ...` and blank lines, and end with [DONE]."""
    blocks = response.text.split("\n\n")
    assert blocks.pop() == ""
    assert blocks.pop() == "data: [DONE]"
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


def error(response, status, code=None):
    """The error's message; its form is OpenAI's."""
    assert response.status_code == status, response.text
    body = response.json()["error"]
    assert set(body) == {"message", "type", "param", "code"}
    assert body["message"]
    assert body["code"] == code
    return body["message"]


def load(client, path, name="new", **fields):
    return client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path, **fields})


def slow_text(client, **fields):
    """Open a stream that goes on for long; the response is still open, and nothing of it read."""
    fields = {"model": "base", "prompt": "abc", "max_tokens": 400, "stream": True, **fields}
    return client.stream("POST", "/v1/completions", json=fields)


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
