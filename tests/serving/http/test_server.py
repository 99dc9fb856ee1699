"""The server: OpenAI's endpoints and forms, through real HTTP, and every request gets its own adapter's tokens."""

import asyncio
import random
import shutil

import pytest
import torch

pytest.importorskip("httpx", reason="httpx is not installed")
import httpx

from tests.support.lora_checkpoints import SETTINGS, checkpoint, greedy_alone, same_or_tied
from tests.support.models import llama
from tests.support.small_server import chat, complete, error, events, serving, tokenizer, until

NAMES = list(SETTINGS)


def alone(service, text, name, count):
    """The text that the adapter gives with nobody beside it."""
    encode = service.tokenizer
    return encode.decode(greedy_alone(service.bank, encode(text)["input_ids"], name, count))


@pytest.mark.parametrize("name", [None, *NAMES])
def test_completions_are_the_adapters(served, name):
    service, client = served
    body = complete(client, name or "base", "hello", max_tokens=9).json()
    assert body["choices"][0]["text"] == alone(service, "hello", name, 9)
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"] == {"prompt_tokens": 5, "completion_tokens": 9, "total_tokens": 14}
    assert (body["object"], body["model"]) == ("text_completion", name or "base")


def test_adapters_differ(served):
    service, _ = served
    assert len({alone(service, "hello", name, 9) for name in (None, *NAMES)}) == 5


def test_prompt_as_tokens_and_in_a_list(client):
    texts = [
        complete(client, "bob", p, max_tokens=5).json()["choices"][0]["text"] for p in ("a b", [66, 1, 67], ["a b"])
    ]
    assert len(set(texts)) == 1


def test_chat_goes_through_the_template(served):
    service, client = served
    body = chat(client, "alice", "hello", max_completion_tokens=7).json()
    message = body["choices"][0]["message"]
    assert message == {"role": "assistant", "content": alone(service, "<user>hello<a>", "alice", 7)}
    assert body["object"] == "chat.completion"
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    assert chat(client, "alice", parts, max_tokens=7).json()["choices"][0]["message"] == message


def test_chat_without_a_template_is_plain_lines(folder, monkeypatch):
    with serving(folder, template=None) as (service, client):
        text = chat(client, "alice", "hello", max_tokens=7).json()["choices"][0]["message"]["content"]
        assert text == alone(service, "user: hello\nassistant:", "alice", 7).split("\nuser:")[0]
        monkeypatch.setattr(
            "fastpeft.serving.http.prompts.NEXT_USER", text[3:5]
        )  # which the small model has no characters for
        choice = chat(client, "alice", "hello", max_tokens=7).json()["choices"][0]
        assert choice["message"]["content"] == text[: text.index(text[3:5])]
        assert choice["finish_reason"] == "stop"


def test_a_template_that_refuses_is_the_clients_error(folder):
    with serving(folder, template="{{ raise_exception('no') }}") as (_, client):
        assert "chat template" in error(chat(client), 400)


def test_streamed_completion(client):
    whole = complete(client, "carol", "hello", max_tokens=9).json()
    response = complete(client, "carol", "hello", max_tokens=9, stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, last = events(response)
    assert "".join(c["choices"][0]["text"] for c in chunks) == whole["choices"][0]["text"]
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert len({c["id"] for c in (*chunks, last)}) == 1
    assert {c["object"] for c in chunks} == {"text_completion"}
    assert (last["choices"], last["usage"]) == ([], whole["usage"])


def test_usage_in_every_chunk(client):
    """As vLLM's benchmark clients ask for it."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    response = complete(client, "bob", "hello", max_tokens=9, stream=True, stream_options=options)
    counts = [event["usage"]["completion_tokens"] for event in events(response)]
    assert counts == sorted(counts)
    assert (counts[0] >= 1, counts[-1]) == (True, 9)


def test_streamed_chat(client):
    whole = chat(client, "dave", "hello", max_tokens=9).json()
    chunks = events(chat(client, "dave", "hello", max_tokens=9, stream=True))
    deltas = [c["choices"][0]["delta"] for c in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert deltas[-1] == {}
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert "".join(d.get("content", "") for d in deltas) == whole["choices"][0]["message"]["content"]
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"}


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings(served, stream):
    service, client = served
    text = alone(service, "hello", "bob", 12)
    stop = text[5:7]
    response = complete(client, "bob", "hello", max_tokens=12, stop=["\x00no", stop], stream=stream)
    choices = [c["choices"][0] for c in (events(response) if stream else [response.json()])]
    assert "".join(choice["text"] for choice in choices) == text[: text.index(stop)]
    assert choices[-1]["finish_reason"] == "stop"


def test_end_of_sequence_ends_the_text(folder):
    with serving(folder) as (service, client):
        tokens = greedy_alone(service.bank, service.tokenizer("hello")["input_ids"], "bob", 12)
        service.batcher._stop_ids = frozenset({tokens[6]})
        choice = complete(client, "bob", "hello", max_tokens=12).json()["choices"][0]
        assert choice["text"] == service.tokenizer.decode(tokens[: tokens.index(tokens[6])])
        assert choice["finish_reason"] == "stop"


def test_a_seed_draws_the_same(client):
    def draw(**fields):
        return complete(client, "bob", "hello", max_tokens=20, temperature=1.5, **fields).json()["choices"][0]["text"]

    assert draw(seed=7) == draw(seed=7)
    assert len({draw(seed=seed) for seed in range(6)}) > 1
    assert draw(seed=7, top_p=1e-9) == draw(seed=8, top_p=1e-9)


def test_models(client):
    body = client.get("/v1/models").json()
    assert [card["id"] for card in body["data"]] == ["base", *sorted(NAMES)]
    assert [card["parent"] for card in body["data"]] == [None, *["base"] * 4]
    assert client.get("/v1/models/bob").json()["id"] == "bob"
    error(client.get("/v1/models/nobody"), 404, "model_not_found")


def test_load_replace_and_unload(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    checkpoint(llama(), tmp_path / "more" / "eve", seed=9, r=4, target_modules=["q_proj", "down_proj"])
    with serving(tmp_path, slots=2) as (service, client):

        def load(**fields):
            return client.post("/v1/load_lora_adapter", json=fields)

        error(complete(client, "eve"), 404, "model_not_found")
        assert load(lora_name="eve", lora_path="more/eve").text == "Success: LoRA adapter 'eve' added successfully."
        first = complete(client, "eve", max_tokens=9).json()["choices"][0]["text"]
        assert first == alone(service, "abc", "eve", 9) != alone(service, "abc", "bob", 9)
        assert "load_inplace" in error(load(lora_name="eve", lora_path="bob"), 400)
        assert load(lora_name="eve", lora_path="bob", load_inplace=True).status_code == 200
        assert complete(client, "eve", max_tokens=9).json()["choices"][0]["text"] == alone(service, "abc", "bob", 9)
        unload = client.post("/v1/unload_lora_adapter", json={"lora_name": "eve"})
        assert unload.text == "Success: LoRA adapter 'eve' removed successfully."
        error(complete(client, "eve"), 404, "model_not_found")
        error(client.post("/v1/unload_lora_adapter", json={"lora_name": "eve"}), 404, "model_not_found")
        error(client.post("/v1/unload_lora_adapter", json={"lora_name": "base"}), 404, "model_not_found")


def test_metrics(folder):
    with serving(folder, slots=2) as (_, client):
        complete(client, "alice", "hello", max_tokens=4)
        complete(client, "alice", "hello", max_tokens=4, stream=True)
        complete(client, "no such thing")
        complete(client, "alice", n=0)
        response = client.get("/metrics")
        assert response.headers["content-type"].startswith("text/plain")
        rows = dict(line.rsplit(" ", 1) for line in response.text.splitlines() if not line.startswith("#"))
        rows = {name: float(value) for name, value in rows.items()}
        assert rows['fastpeft_requests_total{adapter="alice",status="200"}'] == 2
        assert rows['fastpeft_requests_total{adapter="unknown",status="404"}'] == 1
        assert rows['fastpeft_requests_total{adapter="unknown",status="400"}'] == 1
        assert "no such thing" not in response.text  # clients make no labels
        assert rows['fastpeft_prompt_tokens_total{adapter="alice"}'] == 10
        assert rows['fastpeft_generated_tokens_total{adapter="alice"}'] == 8
        assert rows["fastpeft_request_seconds_count"] == rows["fastpeft_time_to_first_token_seconds_count"] == 2
        assert rows["fastpeft_request_seconds_sum"] >= rows["fastpeft_time_to_first_token_seconds_sum"] > 0
        assert (rows["fastpeft_known_adapters"], rows["fastpeft_resident_adapters"]) == (4, 2)
        assert rows["fastpeft_queue_length"] == rows["fastpeft_running_rows"] == 0
        assert client.get("/health").status_code == 200


def test_64_at_once_while_adapters_come_and_go(folder, tmp_path, capsys):
    """Every request's tokens are those of its adapter alone; only ties of the two best logits may fall otherwise."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    choose = random.Random(0)
    asked = [
        ("".join(choose.choice("abcdefgh ") for _ in range(choose.randint(1, 30))), choose.choice([None, *NAMES]))
        for _ in range(64)
    ]
    with serving(tmp_path, slots=2, max_rows=8) as (service, client):
        encode = service.tokenizer

        async def ask(http, text, name, stream):
            fields = {"model": name or "base", "prompt": text, "max_tokens": 16, "temperature": 0, "stream": stream}
            response = await http.post("/v1/completions", json=fields)
            assert response.status_code == 200, response.text
            choices = [c["choices"][0] for c in (events(response) if stream else [response.json()])]
            return encode("".join(choice["text"] for choice in choices))["input_ids"]

        async def churn(http, stop):
            """Load and replace guests, ask them, unload them, without waiting for answers."""
            count, answers = 0, []
            while not stop.is_set():
                name = f"guest{count % 3}"
                made = {"lora_name": name, "lora_path": choose.choice(NAMES), "load_inplace": True}
                assert (await http.post("/v1/load_lora_adapter", json=made)).status_code == 200
                fields = {"model": name, "prompt": "guest", "max_tokens": 4}
                answers.append(asyncio.ensure_future(http.post("/v1/completions", json=fields)))
                await asyncio.sleep(0.02)
                if count % 4 == 3:
                    gone = await http.post("/v1/unload_lora_adapter", json={"lora_name": name})
                    assert gone.status_code == 200
                count += 1
            # 404: unloaded before its turn came
            assert {answer.status_code for answer in await asyncio.gather(*answers)} <= {200, 404}
            return count

        async def all_of_them():
            limits = httpx.Limits(max_connections=300)
            async with httpx.AsyncClient(base_url=client.base_url, limits=limits, timeout=120) as http:
                stop = asyncio.Event()
                churning = asyncio.ensure_future(churn(http, stop))
                results = await asyncio.gather(*(ask(http, *who, i % 2 == 0) for i, who in enumerate(asked)))
                stop.set()
                return results, await churning

        results, loads = asyncio.run(all_of_them())
        until(lambda: service.batcher.running == 0)
        ties = 0
        for (text, name), tokens in zip(asked, results, strict=True):
            ids = encode(text)["input_ids"]
            ties += same_or_tied(service.bank, ids, name, tokens, greedy_alone(service.bank, ids, name, 16))
    with capsys.disabled():
        print(f"\n64 requests, {loads} loads meanwhile: {64 - ties} equal, {ties} that differ at a tie of two logits")
    assert loads >= 3
    assert ties <= 3


def test_the_tokenizer_of_these_tests_is_one_to_one():
    text = "".join(chr(i) for i in range(31, 127))
    assert tokenizer().decode(tokenizer()(text)["input_ids"]) == text
    assert torch.unique(torch.tensor(tokenizer()(text)["input_ids"])).numel() == 96


def test_ids_that_end_the_text(served):
    service, client = served
    tokens = greedy_alone(service.bank, service.tokenizer("hello")["input_ids"], "bob", 12)
    choice = complete(client, "bob", "hello", max_tokens=12, stop_token_ids=[tokens[6]]).json()["choices"][0]
    assert choice["text"] == service.tokenizer.decode(tokens[: tokens.index(tokens[6])])
    assert choice["finish_reason"] == "stop"


def test_probes(client):
    from fastpeft import __version__

    for path in ("/health", "/ready", "/ping"):
        assert (client.get(path).status_code, client.head(path).status_code) == (200, 200)
    assert client.get("/version").json() == {"version": __version__}


def test_metrics_forget_what_is_unloaded(folder):
    with serving(folder, slots=2) as (_, client):
        for i in range(5):
            client.post("/v1/load_lora_adapter", json={"lora_name": f"v{i}", "lora_path": "alice"})
            assert complete(client, f"v{i}", max_tokens=2).status_code == 200
            assert f'adapter="v{i}"' in client.get("/metrics").text
            client.post("/v1/unload_lora_adapter", json={"lora_name": f"v{i}"})
        assert 'adapter="v' not in client.get("/metrics").text
