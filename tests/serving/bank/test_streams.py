"""The order of copies and batches on a device with streams, on stand-ins that record who waits for whom."""

import contextlib

import pytest
import torch

from fastpeft.serving.bank.device import Copies


class Stream:
    def __init__(self, name):
        self.cuda_stream, self.waited, self.recorded = name, [], 0

    def record_event(self):
        self.recorded += 1
        return f"{self.cuda_stream} {self.recorded}"

    def wait_event(self, event):
        self.waited.append(event)


@pytest.fixture
def device(monkeypatch):
    """Copies on a stand-in for a copy stream, and a list whose last item is the current stream."""
    current, inside = [Stream("main")], []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: current[-1])

    @contextlib.contextmanager
    def on(stream):
        inside.append(stream)
        yield
        inside.pop()

    monkeypatch.setattr(torch.cuda, "stream", on)
    copies = Copies(torch.device("cpu"), slots=3)
    copies._stream = Stream("copy")
    return copies, current, inside


def test_a_copy_waits_for_the_last_batches_that_read_its_slot(device):
    copies, current, inside = device
    copies.read({0, 1})
    copies.read({1})
    current.append(Stream("other"))
    copies.read({1})
    with copies.into(1):
        assert inside == [copies._stream]
    assert copies._stream.waited == ["main 2", "other 1"]  # of each stream the last
    with copies.into(1):
        pass
    with copies.into(2):
        pass
    assert copies._stream.waited == ["main 2", "other 1"]  # once, and never for another slot
    with copies.into(0):
        pass
    assert copies._stream.waited[2:] == ["main 1"]


def test_a_batch_waits_for_its_adapters_alone(device):
    copies, current, _ = device
    with copies.into(0):
        ready = copies.copied()
    copies.wait(ready)
    copies.wait(None)
    assert current[-1].waited == ["copy 1"]


def test_no_streams_on_a_cpu():
    copies = Copies(torch.device("cpu"), slots=1)
    with copies.into(0), torch.inference_mode():
        pass
    copies.read({0})
    assert copies.copied() is None
    with torch.inference_mode(), copies.into(0):
        made = torch.zeros(1)
    assert not made.is_inference()
