"""One variant as a case of pytest-benchmark, which keeps a history of times.

A benchmark parametrizes its test in ``pytest_generate_tests``, not in a decorator, so that it runs as a script where
pytest is not installed.
"""

from itertools import cycle

import torch

from . import harness


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def time_one(benchmark, case: harness.Case, which: str, sets: int) -> None:
    """The only variant of ``case``, on one of ``sets`` argument sets after the other; none that the gate refuses."""
    (variant,) = case.variants
    _, refused = harness.gate(variant)
    if refused:
        raise ValueError(f"{variant.name} gets no number: {refused}")
    steps = cycle([variant.bind(i).step(which) for i in range(sets)])

    def timed():
        next(steps)()
        if case.device.type == "cuda":
            torch.cuda.synchronize(case.device)

    facts = {key: value for key, value in case.fields.items() if key in harness.CASE} | {"pass": which}
    benchmark.group = "  ".join(f"{key}={value}" for key, value in facts.items())
    benchmark.pedantic(timed, rounds=12, warmup_rounds=4)
