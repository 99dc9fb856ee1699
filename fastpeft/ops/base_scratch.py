"""The memory that quantised weights are written into, and which no call keeps.

It is an ordinary tensor of the call, and PyTorch's caching allocator gives the same memory to the next layer on that
stream, in captured graphs and in other threads too. A CPU has no such allocator, and memory that is fresh costs more
there than what is written: each thread keeps one buffer, of the largest weight that it has met. The host extension,
where it is, does so by an op that a plan can repeat.
"""

import threading

import torch
from torch import Tensor

from .. import _backend

_kept = threading.local()  # ``bytes``: a CPU's buffer, while nobody writes into it


class Scratch:
    """The memory that weights of a call are written into, one after the other.

    Args:
        like: a tensor of the dtype and device.
        backend: by which they are written.
    """

    def __init__(self, like: Tensor, backend: str):
        self.like, self.on_cpu, self.keeps = like, backend == "reference" and like.device.type == "cpu", False
        self.memory: Tensor | None = None

    def take(self, n: int, k: int) -> Tensor:
        """``[n, k]`` of it, as large as it then has to be."""
        if self.memory is None or len(self.memory) < n * k:
            self.done()
            self.memory = self._new(n * k)
        return self.memory[: n * k].view(n, k)

    def _new(self, count: int) -> Tensor:
        if not self.on_cpu:
            return self.like.new_empty(count)
        memory = _backend.load("dequantise", "reference").scratch(count, self.like.dtype)
        self.keeps = memory is None
        return _taken(count * self.like.itemsize).view(self.like.dtype) if memory is None else memory

    def done(self) -> None:
        """Nothing in it is needed any more; a CPU's thread keeps it."""
        if self.keeps and self.memory is not None:
            _kept.bytes = self.memory.view(torch.uint8)
        self.memory = None


def _taken(count: int) -> Tensor:
    """The thread's buffer, or a new one where it is smaller or in use."""
    found, _kept.bytes = getattr(_kept, "bytes", None), None
    count = -(-count // 8) * 8
    return found if found is not None and len(found) >= count else torch.empty(count, dtype=torch.uint8)
