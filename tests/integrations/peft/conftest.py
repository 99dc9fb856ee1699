"""What the tests of gated MLPs count."""

import functools

import pytest

from fastpeft import ops


@pytest.fixture
def calls(monkeypatch):
    """Which activation every call of the op had."""
    seen, op = [], ops.lora_mlp

    @functools.wraps(op)
    def counted(*args, **kwargs):
        seen.append(kwargs["activation"])
        return op(*args, **kwargs)

    monkeypatch.setattr(ops, "lora_mlp", counted)
    return seen
