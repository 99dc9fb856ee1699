"""The batcher: whoever joins or leaves, every request gets the tokens that its adapter gives it alone."""

import random

import numpy as np
import pytest
import torch

from fastpeft.serving import Batcher

pytest.importorskip("peft", reason="PEFT is not installed")
from tests.support.batching import drawing, prompt, step
from tests.support.lora_checkpoints import SETTINGS, greedy_alone, same_or_tied

NAMES = list(SETTINGS)


def test_every_request_as_if_alone(bank):
    """Random prompts, lengths and adapters, more of them than slots and rows."""
    choose = random.Random(0)
    asked = [
        (prompt(choose.randint(1, 20), i), choose.choice([None, *NAMES]), choose.randint(1, 12)) for i in range(40)
    ]
    with Batcher(bank, max_rows=6) as batcher:
        requests = [batcher.submit(ids, name, max_new_tokens=count) for ids, name, count in asked]
        results = [request.result(60) for request in requests]
    ties = sum(
        same_or_tied(bank, ids, name, tokens, greedy_alone(bank, ids, name, count))
        for (ids, name, count), tokens in zip(asked, results, strict=True)
    )
    assert {request.finish_reason for request in requests} == {"length"}
    assert ties <= 2
    assert not any(adapter.leases for adapter in bank._slots.held if adapter is not None)


def test_join_and_leave_at_every_step(bank):
    """Rows of different age in one batch; a short one leaves while a longer prompt than any joins."""
    batcher = Batcher(bank, max_rows=3)
    first = batcher.submit(prompt(4), "alice", max_new_tokens=9)
    step(batcher)
    second = batcher.submit(prompt(2, 1), None, max_new_tokens=5)
    step(batcher)
    third = batcher.submit(prompt(17, 2), "bob", max_new_tokens=6)
    seen = []
    while not (first.done and second.done and third.done):
        step(batcher)
        seen.append(batcher.running)
    assert (max(seen), seen[-1]) == (3, 0)
    assert sorted(seen, reverse=True) == seen
    for request in (first, second, third):
        alone = greedy_alone(bank, request.prompt, request.adapter, request.max_new_tokens)
        same_or_tied(bank, request.prompt, request.adapter, request.tokens, alone)


def test_sampling_depends_on_the_seed_alone(bank):
    settings = {"max_new_tokens": 8, "temperature": 1.5, "top_p": 0.9}
    with Batcher(bank, max_rows=4) as batcher:
        alone = batcher.submit(prompt(5), "alice", seed=3, **settings).result(30)
        crowd = [batcher.submit(prompt(9, i), NAMES[i % 3], seed=i, **settings) for i in range(5)]
        again = batcher.submit(prompt(5), "alice", seed=3, **settings)
        other = batcher.submit(prompt(5), "alice", seed=4, **settings)
        unseeded = [batcher.submit(prompt(5), "alice", **settings) for _ in range(2)]
        assert again.result(30) == alone != other.result(30)
        assert unseeded[0].result(30) != unseeded[1].result(30)
        assert all(len(request.result(30)) == 8 for request in crowd)


def test_sampled_distribution():
    """20,000 draws follow the probabilities, cut at top_p, at the request's temperature."""
    from fastpeft.serving.engine.sampling import next_tokens

    probability = torch.tensor([0.1, 0.5, 0.25, 0.15])
    request = drawing(temperature=2.0, top_p=0.8)
    logits = 2.0 * probability.log().expand(20_000, 4)
    drawn = torch.tensor(next_tokens(logits, [request] * 20_000))
    expected = torch.tensor([0, 0.5, 0.25, 0.15]) / 0.9
    assert (torch.bincount(drawn, minlength=4) / 20_000 - expected).abs().max() < 5 * (0.25 / 20_000) ** 0.5
    everything = drawing(temperature=2.0)
    drawn = torch.tensor(next_tokens(logits, [everything] * 20_000))
    assert (torch.bincount(drawn, minlength=4) / 20_000 - probability).abs().max() < 5 * (0.25 / 20_000) ** 0.5
    hot, cold = (drawing(temperature=t, top_p=p) for t, p in ((1e-30, 1.0), (1.0, 1e-9)))
    assert next_tokens(logits[:2], [hot, cold]) == [1, 1]
    assert next_tokens(torch.tensor([[0.0, float("nan")], [0.0, 1.0]]), [hot, hot]) == [None, 1]


@pytest.mark.parametrize("top_p", [1.0, 0.9, 1e-30, 0.0])
@pytest.mark.parametrize("temperature", [1e-37, 1e-3, 1.0, 3e38])
def test_no_settings_and_no_logits_stop_the_draw(temperature, top_p):
    """Every row gets a token that can be drawn, or None where NaN or no token is, whatever its neighbours have."""
    from fastpeft.serving.engine.sampling import next_tokens

    infinite = float("inf")
    logits = torch.full((6, 50), -infinite)
    logits[0, 3:5] = torch.tensor([-1e30, 1e30])
    logits[1, 7] = 0.0
    logits[2, :] = 0.0
    logits[3, 9] = float("nan")
    logits[4, 2] = infinite
    for seed in range(20):
        requests = [drawing(temperature=temperature, top_p=top_p, seed=seed) for _ in logits]
        tokens = next_tokens(logits, requests)
        assert [token is None for token in tokens] == [False, False, False, True, False, True]
        assert all(0 <= token < 50 for token in tokens if token is not None)
        if temperature == 1.0:
            assert (tokens[0], tokens[1], tokens[4]) == (4, 7, 2)


@pytest.mark.parametrize("temperature", [0, 1e-46, 1e-45, 1e-40, np.float32(0), np.float64(1e-300)])
def test_what_float32_does_not_tell_from_zero_is_greedy(bank, temperature):
    """A number that float32 rounds to 0 is 0, and harms nobody in the batch."""
    batcher = Batcher(bank)
    other = batcher.submit(prompt(5, 1), "bob", max_new_tokens=4)
    cold = batcher.submit(prompt(5), "alice", max_new_tokens=4, temperature=temperature, top_p=1e-46)
    step(batcher, 5)
    assert cold.result(0) == greedy_alone(bank, prompt(5), "alice", 4)
    assert other.result(0) == greedy_alone(bank, prompt(5, 1), "bob", 4)


def test_stops_at_the_end_of_sequence(bank):
    ids = prompt(6)
    alone = greedy_alone(bank, ids, "bob", 8)
    last = alone[4]
    cut = alone[: alone.index(last)]
    bank.model.generation_config.eos_token_id = [last]
    batcher = Batcher(bank)
    seen = []
    requests = [batcher.submit(ids, "bob", max_new_tokens=8, on_token=seen.append) for _ in range(2)]
    bank.model.generation_config.eos_token_id = None
    batcher_without = Batcher(bank)
    requests.append(batcher_without.submit(ids, "bob", max_new_tokens=8, stop_token_ids=[last]))
    goes_on = batcher_without.submit(ids, "bob", max_new_tokens=8)
    for each in (batcher, batcher_without):
        step(each, 10)
    assert [request.result(0) for request in requests] == [cut] * 3
    assert [request.finish_reason for request in requests] == ["stop"] * 3
    assert sorted(seen) == sorted(cut + cut)
    assert goes_on.result(0) == alone


def test_cancel(bank):
    """Before it begins, while it runs, and from its own callback; the others go on as if nothing had been."""
    batcher = Batcher(bank, max_rows=3)
    stays = batcher.submit(prompt(5), "alice", max_new_tokens=10)
    goes = batcher.submit(prompt(8, 1), "bob", max_new_tokens=10)
    itself = batcher.submit(prompt(3, 2), "carol", max_new_tokens=10, on_token=lambda _: itself.cancel())
    waits, behind = batcher.submit(prompt(3, 3), "dave"), batcher.submit(prompt(3, 3), "dave")
    step(batcher)
    goes.cancel()
    waits.cancel()
    behind.cancel()
    goes_on = [batcher.submit(prompt(2), max_new_tokens=1) for _ in range(2)]
    step(batcher)
    assert behind.done
    assert waits.done
    step(batcher, 12)
    assert all(request.finish_reason == "length" for request in goes_on)
    assert (goes.finish_reason, itself.finish_reason, waits.finish_reason) == ("cancelled",) * 3
    assert (len(goes.result(0)), len(itself.result(0)), waits.result(0)) == (1, 1, [])
    same_or_tied(bank, stays.prompt, "alice", stays.result(0), greedy_alone(bank, stays.prompt, "alice", 10))


def test_slots_are_waited_for_without_starvation(bank):
    """Three slots, three adapters running; the fourth waits, is overtaken at most max_rows times, and gets its turn."""
    batcher = Batcher(bank, max_rows=4)
    running = [batcher.submit(prompt(3, i), name, max_new_tokens=6) for i, name in enumerate(NAMES[:3])]
    blocked = batcher.submit(prompt(3), "dave", max_new_tokens=2)
    stream = [batcher.submit(prompt(3), NAMES[i % 3], max_new_tokens=2) for i in range(12)]
    steps = 0
    while not blocked.done:
        step(batcher)
        steps += 1
    assert 1 <= blocked.overtaken <= 4
    assert not stream[-1].done
    assert steps < 20
    step(batcher, 20)
    assert all(request.done for request in (*running, *stream))


def test_the_cache_is_bounded(bank):
    """No row has blocks that others have, first come first served; a short request does not slip past."""
    batcher = Batcher(bank, max_rows=8, max_cached=60)
    assert batcher.max_tokens == 60
    small = [batcher.submit(prompt(6, i), max_new_tokens=4) for i in range(4)]
    large = batcher.submit(prompt(40), max_new_tokens=10)
    late = batcher.submit(prompt(3), max_new_tokens=2)
    while not late.done:
        step(batcher)
        held = [block for row in batcher._rows._rows for block in row.blocks]
        assert len(set(held)) == len(held) == 4 - batcher._rows._pages.free
        assert large.tokens or not late.tokens
    step(batcher, 8)
    assert [len(request.result(0)) for request in (*small, large, late)] == [4, 4, 4, 4, 10, 2]


def test_text_prompts(bank):
    class Tokenizer:
        eos_token_id = None

        def __call__(self, text):
            return {"input_ids": [ord(c) - 32 for c in text]}

    batcher = Batcher(bank, tokenizer=Tokenizer())
    assert batcher.submit("Hi").prompt == [40, 73]
    assert batcher.submit(torch.tensor([[4, 5]])).prompt == batcher.submit(torch.tensor([4, 5])).prompt == [4, 5]
