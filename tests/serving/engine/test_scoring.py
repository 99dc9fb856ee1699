"""Log-probabilities of prompts: those of each adapter's own forward, whatever runs beside."""

import pytest
import torch

from fastpeft.serving import Batcher, SamplingParams
from fastpeft.serving.engine import scoring

pytest.importorskip("peft", reason="PEFT is not installed")
from tests.support.batching import failing, failing_times, marked, prompt, step
from tests.support.lora_checkpoints import greedy_alone


@pytest.mark.parametrize("chunk", [256, 7, 5])
def test_a_prompts_tokens_are_scored_as_by_one_forward(bank, chunk, monkeypatch):
    """Read in pieces, and beside rows that run."""
    monkeypatch.setattr(scoring, "_CHUNK", chunk)
    ids = prompt(21)
    batcher = Batcher(bank)
    beside = batcher.submit(prompt(9, 1), "alice", max_new_tokens=6)
    step(batcher)
    one = batcher.submit(ids, "bob", max_new_tokens=1, sampling=SamplingParams(prompt_logprobs=3, logprobs=1))
    many = batcher.submit(ids, "bob", max_new_tokens=4, sampling=SamplingParams(prompt_logprobs=0))
    step(batcher, 6)
    with bank.use(["bob"]):
        logits = bank.model(torch.tensor([ids])).logits[0]
        expected = logits.log_softmax(-1)
    assert one.prompt_logprobs[0] is None
    assert [each.token for each in one.prompt_logprobs[1:]] == ids[1:]
    for place, each in enumerate(one.prompt_logprobs[1:]):
        torch.testing.assert_close(torch.tensor(each.logprob), expected[place, each.token])
        assert [token for token, _ in each.top] == expected[place].topk(3).indices.tolist()
    assert [each.logprob for each in many.prompt_logprobs[1:]] == [e.logprob for e in one.prompt_logprobs[1:]]
    assert one.result(0) == greedy_alone(bank, ids, "bob", 1)
    assert [each.token for each in one.logprobs] == one.tokens
    assert many.result(0) == greedy_alone(bank, ids, "bob", 4)
    assert beside.result(0) == greedy_alone(bank, prompt(9, 1), "alice", 6)
    assert not many.logprobs


@pytest.mark.parametrize(
    ("times", "error", "forwards"), [(1, ArithmeticError, 3), (2, ArithmeticError, 2), (1, torch.AcceleratorError, 1)]
)
def test_a_prompt_is_scored_again_after_a_fault(bank, times, error, forwards):
    """Once, and not on a device that is lost; what it comes to is what it had come to without."""
    batcher, sampling = Batcher(bank), SamplingParams(prompt_logprobs=1)
    wanted = batcher.submit(prompt(9), "bob", max_new_tokens=2, sampling=sampling)
    step(batcher, 3)
    request = batcher.submit(prompt(9), "bob", max_new_tokens=2, sampling=sampling)
    with failing_times(bank, times, error) as seen:
        step(batcher)
    assert len(seen) == forwards, "those of its scores, and a step if it has them"
    step(batcher, 2)
    if forwards == 3:
        assert (request.result(0), request.prompt_logprobs) == (wanted.result(0), wanted.prompt_logprobs)
    else:
        with pytest.raises(error):
            request.result(0)


def test_a_prompt_that_fails_ends_alone(bank):
    batcher = Batcher(bank)
    with failing(bank, marked(bank, 5)):
        wrong = batcher.submit([5, 1], "bob", max_new_tokens=1, sampling=SamplingParams(prompt_logprobs=1))
        right = batcher.submit([6, 1], "bob", max_new_tokens=1, sampling=SamplingParams(prompt_logprobs=1))
        step(batcher)
    assert right.result(0)
    with pytest.raises(ArithmeticError):
        wrong.result(0)
