"""A batcher at the pace of a test, prompts for it, and models that fail where a test says so."""

import contextlib
import time

import torch

from tests.support.models import VOCAB


def prompt(length, seed=0):
    return torch.randint(1, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def drawing(stop_ids=(), tokens=(), prompt=(1,), **settings):
    """A request as it stands before its next token is chosen."""
    from fastpeft.serving.engine.request import Request
    from fastpeft.serving.engine.settings import SamplingParams

    request = Request(prompt, None, 99, SamplingParams(**settings), frozenset(stop_ids), None)
    request.tokens += tokens
    return request


def step(batcher, times=1):
    """What the batcher's thread does, at a pace that the test sets."""
    for _ in range(times):
        batcher._turn()


def until(condition, seconds=60.0):
    """Wait for it, also on a busy machine."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.005)


@contextlib.contextmanager
def failing(bank, wrong, error=ArithmeticError):
    """Forwards raise in the last layer, where those before have written to the cache, if ``wrong`` says so of its x."""
    mlp = bank.model.model.layers[-1].mlp

    def check(_, arguments):
        if wrong(arguments[0]):
            raise error("boom")

    handle = mlp.register_forward_pre_hook(check)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def failing_times(bank, times, error=ArithmeticError):
    """So many forwards raise, the next ones do not; each one's x, as they come."""
    seen = []
    with failing(bank, lambda x: seen.append(x) or len(seen) <= times, error):
        yield seen


def marked(bank, *tokens):
    """Whether a forward has the embedding of one of the tokens among its inputs, as a count of calls that did."""
    seen = [False]
    bank.model.get_input_embeddings().register_forward_pre_hook(
        lambda _, arguments: seen.__setitem__(0, any(token in arguments[0] for token in tokens))
    )
    return lambda _: seen[0]
