"""How much of a lora_mlp is computed at a time."""

import pytest

from fastpeft import _backend
from tests.support.backends import BACKENDS


@pytest.fixture
def cut(monkeypatch):
    """Has so many columns be computed at a time, and so many rows; without a number, all."""

    def change(columns, rows=None):
        wanted = rows
        for backend in BACKENDS:
            impl = _backend.load("lora_mlp", backend)
            monkeypatch.setattr(impl, "part_columns", lambda rows, size: columns or size)
            monkeypatch.setattr(impl, "chunk_rows", lambda rows, _: wanted or max(1, rows))

    change(None)
    return change
