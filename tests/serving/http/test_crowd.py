"""Full banks and queues, clients that leave or do not read, steps that fail: who is not concerned goes on."""

import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.small_server import complete, error, load, serving, slow_text, until


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
                refused = list(pool.map(lambda _: complete(client, "alice"), range(4)))
                for response in refused:
                    error(response, 429, "queue_full")
                    assert response.headers["retry-after"] == "1"
                first.close()
                assert [request.result(30).status_code for request in waiting] == [200, 200]
        assert complete(client, "bob").status_code == 200


def test_one_tenant_may_take_only_so_much(folder):
    """Its further requests are refused while another's begins at once."""
    with serving(folder, step_seconds=0.02, adapter_rows=1, adapter_waiting=1) as (service, client):
        with slow_text(client, model="alice") as first, ThreadPoolExecutor(2) as pool:
            until(lambda: service.batcher.running == 1)
            waiting = pool.submit(complete, client, "alice", max_tokens=2)
            until(lambda: service.batcher.waiting == 1)
            error(complete(client, "alice"), 429, "queue_full")
            assert complete(client, "bob", max_tokens=2).status_code == 200
            assert not waiting.done()
            first.close()
            assert waiting.result(30).status_code == 200


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
            if len(calls) >= 5:  # and when it is tried again
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


def test_a_temperature_that_float32_rounds_to_zero_harms_nobody(folder):
    with serving(folder, step_seconds=0.02) as (_, client), ThreadPoolExecutor(4) as pool:
        others = [pool.submit(complete, client, name, max_tokens=40) for name in ("alice", "bob", "carol")]
        for value in (1e-46, 1e-40):
            assert complete(client, temperature=value, max_tokens=3).status_code == 200
        assert [request.result(30).status_code for request in others] == [200] * 3


def test_health_tells_of_a_model_that_can_do_nothing(folder):
    with serving(folder) as (service, client):

        def fail(*_):
            raise RuntimeError("the device is gone, says /secret/path")

        assert client.get("/health").status_code == client.get("/ready").status_code == 200
        hook = service.bank.model.register_forward_pre_hook(fail)
        error(complete(client, max_tokens=2), 500, "internal_error")
        until(lambda: client.get("/health").status_code == 503)
        assert client.get("/ready").text == "the model's forward fails (RuntimeError)"
        hook.remove()
        assert complete(client, max_tokens=2).status_code == 200
        until(lambda: client.get("/health").status_code == 200)


def test_a_client_that_leaves_before_its_body_has_arrived_is_no_error(folder):
    with serving(folder) as (_, client):
        for path in ("completions", "load_lora_adapter"):
            head = (
                f"POST /v1/{path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
            )
            with socket.create_connection((client.base_url.host, client.base_url.port), timeout=10) as sock:
                sock.sendall(head.encode() + b"Content-Length: 100\r\n\r\n{")
        until(lambda: 'status="499"} 1.0' in client.get("/metrics").text)
        assert 'status="500"' not in client.get("/metrics").text


def test_an_adapter_that_overflows_is_the_clients_error(folder):
    with serving(folder) as (service, client):
        for site in service.bank._sites:
            if site.lora_b is not None:
                site.lora_b.fill_(1e30)
        assert "logits of adapter 'alice' are not numbers" in error(
            complete(client, "alice"), 400, "adapter_not_finite"
        )
        assert complete(client).status_code == 200


def test_no_token_and_no_end_is_lost_between_the_threads(folder):
    """However the loop and the batcher's thread interleave: here the loop looks before and after each that arrives."""
    with serving(folder) as (service, client):
        arrived, hand_out = service._arrived, service._hand_out

        class Interleaved(type(arrived)):
            def append(self, item):
                for act in (lambda: None, lambda: super(Interleaved, self).append(item)):
                    act()
                    done = threading.Event()
                    item[0].loop.call_soon_threadsafe(lambda done=done: (hand_out(), done.set()))
                    done.wait(10)

        service._arrived = Interleaved()
        for _ in range(20):
            body = complete(client, "alice", max_tokens=9).json()
            assert body["usage"]["completion_tokens"] == 9
