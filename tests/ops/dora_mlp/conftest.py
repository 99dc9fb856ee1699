"""How much of a dora_mlp is computed at a time."""

import pytest

from fastpeft import _backend
from tests.support.backends import BACKENDS


@pytest.fixture
def cut(monkeypatch):
    """Has so many rows be computed at a time where weights are dense, and so many columns where one is quantised."""

    def change(rows=None, columns=None):
        for backend in BACKENDS:
            impl = _backend.load("lora_mlp", backend)
            monkeypatch.setattr(impl, "chunk_rows", lambda size, _: rows or max(1, size))
            monkeypatch.setattr(impl, "part_columns", lambda _, size: columns or size)

    change()
    return change
