"""What goes wrong around a batcher stays with the request it concerns: errors, full queues and banks, stopping."""

import threading
import time

import pytest
from torch import nn

from fastpeft.serving import AdapterBank, BankError, BankFull, Batcher, QueueFull, UnknownAdapter

pytest.importorskip("peft", reason="PEFT is not installed")
from tests.support.batching import failing, marked, prompt, step
from tests.support.lora_checkpoints import SETTINGS, greedy_alone
from tests.support.models import VOCAB, llama

NAMES = list(SETTINGS)


def test_errors_stay_with_their_request(bank, folders):
    """A callback that raises, an adapter that goes while it is waited for, NaN, a prompt that cannot be read."""
    batcher = Batcher(bank, max_rows=8)

    def fails(token):
        raise RuntimeError("the client is gone")

    bank.load("gone", folders["alice"])
    good = [batcher.submit(prompt(5, i), "alice", max_new_tokens=5) for i in range(2)]
    bad = [
        batcher.submit(prompt(5), "bob", on_token=fails),
        batcher.submit(prompt(5), "gone"),
    ]
    bank.unload("gone")
    token = next(
        i for i in range(1, VOCAB) if not any(i in (*r.prompt, *greedy_alone(bank, r.prompt, "alice", 5)) for r in good)
    )
    bad.append(batcher.submit([token, token], "alice"))
    with failing(bank, marked(bank, token)):
        step(batcher, 6)
    assert all(len(request.result(0)) == 5 for request in good)
    for request, error, text in zip(
        bad, (RuntimeError, UnknownAdapter, ArithmeticError), ("client", "gone", "boom"), strict=True
    ):
        assert request.finish_reason == "error"
        with pytest.raises(error, match=text):
            request.result(0)
    bank.model.lm_head.weight.data[3] = float("nan")
    ill = batcher.submit(prompt(5), "alice", max_new_tokens=5)
    step(batcher)
    with pytest.raises(BankError, match="the logits of adapter 'alice' are not numbers"):
        ill.result(0)


def test_bank_full_of_pinned_adapters(bank):
    for name in NAMES[:3]:
        bank.pin(name)
    with Batcher(bank) as batcher:
        impossible = batcher.submit(prompt(3), "dave")
        assert len(batcher.submit(prompt(3), "alice", max_new_tokens=2).result(30)) == 2
        with pytest.raises(BankFull, match="3 others are pinned"):
            impossible.result(30)


def test_queue_full_and_stopping(bank):
    batcher = Batcher(bank, max_rows=1, max_waiting=2)
    requests = [batcher.submit(prompt(3), max_new_tokens=3) for _ in range(2)]
    with pytest.raises(QueueFull, match="submit: 2 requests wait, expected fewer than 2"):
        batcher.submit(prompt(3))
    assert (batcher.waiting, batcher.running) == (2, 0)
    batcher.start()
    with pytest.raises(BankError, match="start: the batcher is running"):
        batcher.start()
    assert batcher.stop(drain=True, timeout=30)
    assert all(len(request.result(0)) == 3 for request in requests)
    with pytest.raises(BankError, match="submit: the batcher is stopping"):
        batcher.submit(prompt(3))
    batcher.start()
    last = [batcher.submit(prompt(3), max_new_tokens=400) for _ in range(2)]
    assert batcher.stop(drain=False, timeout=30)
    assert [request.finish_reason for request in last] == ["cancelled"] * 2
    batcher.start()
    reading, read = threading.Event(), batcher._rows.join
    batcher._rows.join = lambda requests: reading.set() or time.sleep(0.1) or read(requests)
    midway = batcher.submit(prompt(3), max_new_tokens=400)  # neither in the queue nor among the rows
    assert reading.wait(30)
    assert batcher.stop(drain=False, timeout=30)
    assert midway.finish_reason == "cancelled"
    idle = Batcher(bank)
    never = idle.submit(prompt(3))
    assert idle.stop()
    assert never.result(0) == []


def test_loads_and_unloads_while_it_runs(bank, folders):
    """An adapter is replaced all the time: every request sees one of the two, whole."""
    alone = [greedy_alone(bank, prompt(6), name, 10) for name in ("alice", "bob")]
    assert alone[0] != alone[1]
    bank.load("swapped", folders["alice"])
    stop = threading.Event()

    def swap():
        turn = 0
        while not stop.is_set():
            turn += 1
            bank.load("swapped", folders[("alice", "bob")[turn % 2]])
            bank.load(f"other {turn % 5}", folders["carol"])

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        with Batcher(bank, max_rows=4) as batcher:
            requests = [batcher.submit(prompt(6), "swapped", max_new_tokens=10) for _ in range(24)]
            results = [request.result(60) for request in requests]
    finally:
        stop.set()
        thread.join()
    assert all(tokens in alone for tokens in results)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"input_ids": []}, ValueError, "submit: input_ids is empty"),
        (
            {"input_ids": [1, VOCAB]},
            ValueError,
            rf"input_ids\[1\] is {VOCAB} \(int\), expected token ids from 0 to {VOCAB - 1}",
        ),
        ({"input_ids": "text"}, TypeError, "there is no tokenizer"),
        (
            {"input_ids": [1] * 500},
            ValueError,
            "500 prompt and 128 new tokens are asked for, expected at most max_tokens",
        ),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens is 0"),
        ({"input_ids": 3}, TypeError, r"input_ids is 3 \(int\), expected a list"),
        ({"temperature": -1.0}, ValueError, r"temperature is -1.0 \(float\), expected a number from 0"),
        ({"temperature": float("nan")}, ValueError, "temperature is nan"),
        ({"temperature": 1e39}, ValueError, "temperature is 1e\\+39"),
        ({"temperature": "1"}, ValueError, r"temperature is '1' \(str\)"),
        ({"temperature": True}, ValueError, "temperature is True"),
        ({"top_p": 1.5}, ValueError, r"top_p is 1.5 \(float\), expected a number from 0 to 1"),
        ({"adapter": "eve"}, UnknownAdapter, "submit: no adapter 'eve'"),
    ],
)
def test_errors_name_what_is_wrong(bank, arguments, error, message):
    with pytest.raises(error, match=message):
        Batcher(bank).submit(**{"input_ids": [1, 2], **arguments})


def test_models_without_a_plain_cache_are_refused(bank):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(8, 4)

        def get_input_embeddings(self):
            return self.embed

        def forward(self, input_ids, past_key_values=None, use_cache=None):
            return type("Output", (), {"logits": self.embed(input_ids), "past_key_values": [input_ids]})()

    with pytest.raises(ValueError, match="model is Recurrent with a list, expected one whose cache is keys and values"):
        Batcher(AdapterBank(Recurrent().eval()))
    with pytest.raises(ValueError, match="training mode"):
        Batcher(AdapterBank(llama().train()))
