"""What the tests of siblings count."""

import pytest

from tests.support import siblings


@pytest.fixture
def calls(monkeypatch):
    """The number of projections of every call that computes for siblings."""
    return siblings.counted(monkeypatch)
