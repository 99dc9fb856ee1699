"""The soak: a short one passes, and what it looks for it would find."""

import pytest

pytest.importorskip("httpx", reason="httpx is not installed")
pytest.importorskip("peft", reason="PEFT is not installed")

from bench import soak, soak_clients
from bench.soak_clients import Site

GOOD = {"exit": 0, "accepted": 5, "length": 3, "cancelled": 1, "error": 1, "grown": 0}


@pytest.mark.thorough
@pytest.mark.slow
def test_half_a_minute_loses_nothing():
    found = soak.soak(0.5)
    assert soak.verdict(found) == []
    assert found["counts"]["right"] > 50
    assert {"left", "killed", "loads", "failed as it must"} <= set(found["counts"])
    assert len(found["servers"]) >= 2


@pytest.mark.parametrize("change", [{"exit": 1}, {"length": 2}, {"grown": 1 << 30}], ids=str)
def test_a_server_that_fails_loses_or_grows_is_seen(change):
    assert soak.verdict({"faults": [], "servers": [GOOD]}) == []
    assert len(soak.verdict({"faults": [], "servers": [GOOD | change]})) == 1


@pytest.fixture
def site():
    answers = {"alice": ["abc", None], "v0": ["xyz", "uvw"], "v1": ["rst", "opq"]}
    return Site(1, answers, [[1], [2]])


@pytest.mark.parametrize(
    ("kind", "name", "status", "text", "counted"),
    [
        ("whole", "alice", 200, "abc", "right"),
        ("whole", "alice", 200, "abd", "wrong"),
        ("leave", "alice", 200, "ab", "left"),
        ("leave", "alice", 200, "b", "wrong"),
        ("whole", "alice", 200, "ab", "wrong"),
        ("stream", "alice", 500, None, "lost"),
        ("whole", "alice", 404, None, "lost"),
        ("unknown", "alice", 404, None, "refused: no such adapter"),
        ("unknown", "alice", 200, "abc", "wrong"),
        ("poisoned", "alice", 500, None, "failed as it must"),
        ("poisoned", "alice", 200, "abc", "wrong"),
        ("whole", "alice", 429, None, "refused: full"),
        ("whole", "live0", 404, None, "refused: no such adapter"),
        ("whole", "live0", 200, "xyz", "right"),
        ("whole", "live0", 200, "rst", "wrong"),
    ],
)
def test_answers_are_judged(site, kind, name, status, text, counted):
    with site.versions.change("live0", "v0"):
        soak_clients._judge(site, kind, name, 0, status, text, 0.0)
    assert site.tally.counts == {counted: 1}
    assert bool(site.tally.faults) is (counted in ("wrong", "lost"))


def test_a_version_that_was_replaced_before_is_wrong(site):
    for folder in ("v0", "v1"):
        with site.versions.change("live0", folder):
            pass
    assert site.versions.during("live0", float("inf"), float("inf")) == {"v1"}
    assert site.versions.during("live0", 0.0, float("inf")) == {"", "v0", "v1"}


def test_prompts_with_near_ties_are_not_asked(site):
    assert site.places("alice") == [0]
    assert site.places("live0") == [0, 1]
