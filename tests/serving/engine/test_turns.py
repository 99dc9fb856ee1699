"""Turns: adapters by turns, by weight; nobody saves turns up, nobody pays with them for having come in a crowd."""

from itertools import islice

import pytest

from fastpeft.serving.engine.request import Request
from fastpeft.serving.engine.settings import SamplingParams
from fastpeft.serving.engine.turns import Turns


def requests(*names):
    return [Request([1], name, 9, SamplingParams(), frozenset(), None) for name in names]


def served(turns, waiting, count=None, skipped=()):
    """The adapters whose turn it is, one after the other; the requests are no longer waiting then."""
    order = []
    for request in islice(turns.order(tuple(waiting), set(skipped)), count):
        turns.taken(request)
        waiting.remove(request)
        order.append(request.adapter)
    return order


def test_by_turns_and_within_one_first_come_first_served():
    turns, waiting = Turns({}), requests("a", "a", "a", "b", None, "b")
    given = list(waiting)
    assert list(turns.order(waiting, set()))[:1] == given[:1]
    assert served(turns, waiting) == ["a", "b", None, "a", "b", "a"]
    first, *_ = turns.order(given[:3], set())
    assert first is given[0]


def test_between_two_steps_the_turns_go_on():
    turns, waiting = Turns({}), requests("a", "a", "a", "b", "b", "b")
    assert [served(turns, waiting, 1) for _ in range(6)] == [["a"], ["b"], ["a"], ["b"], ["a"], ["b"]]


@pytest.mark.parametrize(("weight", "expected"), [(3.0, 9), (1.0, 6), (0.5, 4)])
def test_turns_are_as_many_as_the_weights(weight, expected):
    turns, waiting = Turns({"a": weight}), requests(*"a" * 20, *"b" * 20)
    assert served(turns, waiting, 12).count("a") == expected


def test_nobody_saves_turns_up():
    """Who was away for ten turns of others gets one, and then they alternate."""
    turns = Turns({})
    served(turns, requests("a", "b"))
    served(turns, requests(*"b" * 10))
    assert served(turns, requests(*"b" * 4, *"a" * 4)) in (list("babababa"), list("abababab"))


def test_who_comes_anew_waits_for_no_crowd_and_overtakes_no_other():
    turns, waiting = Turns({}), requests(*"a" * 9, *"b" * 9)
    served(turns, waiting, 10)
    waiting += requests("c", "c", "c")
    assert served(turns, waiting, 6).count("c") == 2


def test_who_leaves_keeps_the_turn_that_is_not_due_yet():
    turns = Turns({"slow": 0.25})
    served(turns, requests("slow"))
    served(turns, requests("a"))
    assert served(turns, requests("slow", "a", "a", "a")) == ["a", "a", "a", "slow"]


def test_those_who_have_left_take_no_memory():
    turns = Turns({})
    for i in range(50):
        served(turns, requests(f"tenant {i}", "steady"))
    assert len(turns._due) <= 3


def test_who_is_skipped_or_has_ended_gets_no_turn():
    turns, waiting = Turns({}), requests("a", "b", "a", "b")
    waiting[0].finish("cancelled")
    assert served(turns, list(waiting), skipped="b") == ["a"]
    skipped, seen = set(), []
    for request in turns.order(waiting, skipped):
        seen.append(request.adapter)
        skipped.add(request.adapter)
    assert sorted(seen) == ["a", "b"]
