"""From the batcher's thread to the event loop: woken once for what a step brings, and nothing stays behind."""

from collections import deque
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi", reason="FastAPI is not installed: pip install 'fastpeft[serve]'")
pytest.importorskip("prometheus_client", reason="prometheus-client is not installed: pip install 'fastpeft[serve]'")

from fastpeft.serving.http.service import Service


class Door(SimpleNamespace):
    """What Service's two methods use of it, beside a loop that notes what it is to call."""

    def __init__(self):
        super().__init__(_arrived=deque(), _woken=False, calls=[], got=[])
        loop = SimpleNamespace(call_soon_threadsafe=self.calls.append)
        self.completion = SimpleNamespace(loop=loop, tokens=SimpleNamespace(put_nowait=self.got.append))

    def deliver(self, token):
        Service.deliver(self, self.completion, token)

    def _hand_out(self):
        Service._hand_out(self)

    def turn(self):
        """What the loop does with what it was told so far."""
        calls, self.calls[:] = list(self.calls), []
        for call in calls:
            call()


def test_the_loop_is_woken_once_for_the_tokens_of_a_step():
    door = Door()
    for step in range(3):
        for token in range(4):
            door.deliver(10 * step + token)
        assert len(door.calls) == 1
        door.turn()
        assert door.got == [10 * s + token for s in range(step + 1) for token in range(4)]
        assert not door.calls


def test_what_comes_while_the_loop_looks_is_not_left_behind():
    """Even behind its last look: the batcher's thread may run between any two steps of the loop's."""
    door = Door()

    more = [3]

    class Late(deque):
        def __bool__(self):
            found = len(self) > 0
            if not found and more:
                door.deliver(more.pop())
            return found

    door._arrived = Late()
    door.deliver(1)
    door.deliver(2)
    while door.calls:
        door.turn()
    assert door.got == [1, 2, 3]
