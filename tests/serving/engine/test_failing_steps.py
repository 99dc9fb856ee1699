"""A step that fails ends the rows that make it fail; a batcher says whether it can serve anybody at all."""

import sys
import threading

import pytest
import torch

from fastpeft.serving import Batcher

pytest.importorskip("peft", reason="PEFT is not installed")
from tests.support.batching import failing, failing_times, marked, prompt, step, until
from tests.support.lora_checkpoints import SETTINGS, greedy_alone
from tests.support.models import VOCAB

NAMES = list(SETTINGS)


def test_a_failing_step_ends_the_row_that_fails(bank):
    """Every other row goes on with the tokens that it has alone, whichever layers had been through the step."""
    batcher = Batcher(bank, max_rows=5)
    ill = batcher.submit(prompt(4, 9), "alice", max_new_tokens=9)  # the oldest, so it is not taken for the youngest
    others = [batcher.submit(prompt(3 + i, i), name, max_new_tokens=9) for i, name in enumerate((*NAMES[:3], None))]
    alone = [greedy_alone(bank, r.prompt, r.adapter, 9) for r in others]
    token = next(i for i in range(1, VOCAB) if not any(i in tokens for tokens in alone))
    step(batcher, 2)
    ill.tokens[-1] = token
    with failing(bank, marked(bank, token)):
        step(batcher, 12)
    with pytest.raises(ArithmeticError, match="boom"):
        ill.result(0)
    assert [request.result(0) for request in others] == alone
    assert not any(adapter.leases for adapter in bank._slots.held if adapter is not None)
    assert batcher._steps.broken is None


@pytest.fixture(params=["paged", "padded"])
def cache(request, monkeypatch):
    if request.param == "padded":
        monkeypatch.setattr("fastpeft.serving.engine.rows.unpaged_reason", lambda *_: "as the test wants it")


@pytest.mark.parametrize("begun", [False, True], ids=["its prompt", "a token"])
@pytest.mark.parametrize("error", [ArithmeticError, torch.OutOfMemoryError])
def test_a_step_of_one_row_is_tried_twice(bank, cache, begun, error):
    """A fault that passes ends nobody, one that stays ends the row; the bank and those who wait go on."""
    batcher = Batcher(bank, max_rows=1)
    alone = greedy_alone(bank, prompt(4), "alice", 5)
    for times, ends in ((1, "length"), (2, "error")):
        request = batcher.submit(prompt(4), "alice", max_new_tokens=5)
        step(batcher, 2 if begun else 0)
        with failing_times(bank, times, error):
            step(batcher, 7)
        assert request.finish_reason == ends
        assert request.tokens == (alone if ends == "length" else alone[: len(request.tokens)])
        assert isinstance(request.error, error) == (ends == "error")
    assert not any(adapter.leases for adapter in bank._slots.held if adapter is not None)


def test_a_row_that_is_tried_by_itself_is_tried_twice(bank, cache):
    """The step of two fails, and then the first of them alone, once."""
    batcher = Batcher(bank, max_rows=2)
    requests = [batcher.submit(prompt(4, i), "alice", max_new_tokens=5) for i in range(2)]
    alone = [greedy_alone(bank, request.prompt, "alice", 5) for request in requests]
    step(batcher, 2)
    before = [len(request.tokens) for request in requests]
    with failing_times(bank, 2):
        step(batcher)
        assert [len(request.tokens) for request in requests] == [count + 1 for count in before]
        step(batcher, 3)
    assert [request.result(0) for request in requests] == alone


@pytest.mark.parametrize("rows", [1, 3])
def test_nothing_is_tried_again_on_a_device_that_is_lost(bank, cache, rows):
    batcher = Batcher(bank, max_rows=3)
    requests = [batcher.submit(prompt(4), "alice", max_new_tokens=5) for _ in range(rows)]
    step(batcher, 2)
    with failing_times(bank, 1, torch.AcceleratorError) as seen:
        step(batcher)
    assert len(seen) == 2, "the step, and the engine's look at the bare model"
    assert all(isinstance(request.error, torch.AcceleratorError) for request in requests)


def test_a_device_that_is_lost_while_rows_are_tried_apart(bank, cache):
    batcher = Batcher(bank, max_rows=4)
    requests = [batcher.submit(prompt(4), "alice", max_new_tokens=5) for _ in range(4)]
    step(batcher, 2)
    errors = iter([ArithmeticError("boom"), torch.AcceleratorError("lost"), torch.AcceleratorError("lost")])

    def fails(_):
        error = next(errors, None)
        if error is not None:
            raise error

    with failing(bank, fails):
        step(batcher)
    assert next(errors, None) is None, "the step, and each half"
    assert all(isinstance(request.error, torch.AcceleratorError) for request in requests)


def test_when_every_row_fails_the_queue_goes_on(bank):
    batcher = Batcher(bank, max_rows=2)
    running = [batcher.submit(prompt(4, i), "alice", max_new_tokens=5) for i in range(2)]
    waiting = batcher.submit(prompt(6), "alice", max_new_tokens=3)
    step(batcher)
    with failing(bank, lambda x: True):
        step(batcher)
    for request in running:
        with pytest.raises(ArithmeticError):
            request.result(0)
    step(batcher, 4)
    assert len(waiting.result(0)) == 3
    assert not any(adapter.leases for adapter in bank._slots.held if adapter is not None)


def test_memory_that_runs_out_ends_the_youngest(bank):
    """As many rows as there is memory for go on."""
    batcher = Batcher(bank, max_rows=4)
    requests = [batcher.submit(prompt(4, i), max_new_tokens=6) for i in range(4)]
    alone = [greedy_alone(bank, request.prompt, None, 6) for request in requests]
    step(batcher)
    with failing(bank, lambda x: x.shape[1] > 2, torch.OutOfMemoryError):
        step(batcher, 6)
    assert [request.finish_reason for request in requests] == ["length", "length", "error", "error"]
    assert [request.result(0) for request in requests[:2]] == alone[:2]
    for request in requests[2:]:
        with pytest.raises(torch.OutOfMemoryError):
            request.result(0)


def test_what_is_wrong_with_the_engine(bank, monkeypatch):
    """Its thread, a step that does not end, a model that can do nothing; a request's own fault is none of them."""
    batcher = Batcher(bank, stall_seconds=0.2)
    assert batcher.problem() == "the batcher does not run"
    with batcher:
        assert batcher.problem() is None
        with failing(bank, lambda x: x.shape[1] == 7):
            with pytest.raises(ArithmeticError):
                batcher.submit(prompt(7)).result(30)
        assert batcher.problem() is None
        with failing(bank, lambda x: True):
            with pytest.raises(ArithmeticError):
                batcher.submit(prompt(3)).result(30)
            until(lambda: batcher.problem() == "the model's forward fails (ArithmeticError)")
        assert batcher.submit(prompt(3), max_new_tokens=1).result(30)
        until(lambda: batcher.problem() is None)
        stuck = threading.Event()
        with failing(bank, lambda x: not stuck.wait(30)):
            waits = batcher.submit(prompt(3), max_new_tokens=1)
            until(lambda: str(batcher.problem()).startswith("the step that runs began"))
            stuck.set()
            assert waits.result(30)
        monkeypatch.setattr(batcher, "_turn", lambda: sys.exit(1))
        with pytest.raises(SystemExit):
            batcher.submit(prompt(3)).result(30)
        until(lambda: batcher.problem() == "the batcher does not run")
