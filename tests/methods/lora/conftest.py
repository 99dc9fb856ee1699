"""What the tests of siblings count."""

import pytest

import fastpeft


@pytest.fixture
def calls(monkeypatch):
    """The number of projections of every call of the shared op."""
    counts = []
    op = fastpeft.ops.lora_linear_shared

    def counted(x, weights, *args, **kwargs):
        counts.append(len(weights))
        return op(x, weights, *args, **kwargs)

    monkeypatch.setattr(fastpeft.ops, "lora_linear_shared", counted)
    return counts
