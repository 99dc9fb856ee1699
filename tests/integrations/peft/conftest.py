"""What the tests of gated MLPs count."""

import functools

import pytest

from fastpeft import ops


@pytest.fixture
def calls(monkeypatch):
    """Which activation every call of the ops had."""
    seen = []

    def counting(op):
        @functools.wraps(op)
        def counted(*args, **kwargs):
            seen.append(kwargs["activation"])
            return op(*args, **kwargs)

        return counted

    for name in ("lora_mlp", "dora_mlp"):
        monkeypatch.setattr(ops, name, counting(getattr(ops, name)))
    return seen
