"""How much of a lora_mlp is computed at a time."""

import pytest

from fastpeft import _backend
from tests.support.backends import BACKENDS


@pytest.fixture
def cut(monkeypatch):
    """Has so many columns be computed at a time, and all rows."""

    def change(columns):
        for backend in BACKENDS:
            impl = _backend.load("lora_mlp", backend)
            monkeypatch.setattr(impl, "part_columns", lambda rows, size: columns or size)
            monkeypatch.setattr(impl, "chunk_rows", lambda rows, _: max(1, rows))

    change(None)
    return change
