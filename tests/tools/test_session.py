"""What a session of tests makes once is made once, by whoever asks first, and again where that failed."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support import session

pytestmark = pytest.mark.thorough


@pytest.fixture(autouse=True)
def own_session(monkeypatch, tmp_path):
    monkeypatch.setenv(session._VARIABLE, str(tmp_path))


def test_made_once_and_others_wait():
    calls = []

    def make(folder):
        calls.append(folder)
        time.sleep(0.2)
        (folder / "file").write_text("made")

    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(lambda _: session.once("thing", make), range(4)))
    assert calls == folders[:1]
    assert [(folder / "file").read_text() for folder in folders] == ["made"] * 4


def test_a_failure_is_tried_again_from_nothing():
    def fail(folder):
        (folder / "half").touch()
        raise RuntimeError("no compiler")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="no compiler"):
            session.once("thing", fail)
    assert list(session.once("thing", lambda folder: (folder / "whole").touch()).iterdir()) == [
        session.once("thing", fail) / "whole"
    ]


def test_ended_leaves_nothing(tmp_path):
    session.begin()
    folder = session.once("thing", lambda folder: None).parent
    assert folder != tmp_path
    session.end()
    assert not folder.exists()
