"""A GPU that computes nothing: a CUDA build of PyTorch runs on a machine without a GPU (README.md here says how).

``python -m bench.nullgpu SCRIPT`` starts a process on it; in there, ``counters`` and ``counted`` say what was asked of
the device.
"""

import contextlib
import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass

LOADED = "libcudart.so.13"


class _Counters(ctypes.Structure):
    """``struct counters`` of src/device.h."""

    _fields_ = [
        (name, ctypes.c_long)
        for name in (
            "launches",
            "copies",
            "syncs",
            "pageable",
            "graph_launches",
            "refused",
            "stray",
            "missing",
            "allocations",
            "frees",
            "bytes",
            "peak",
        )
    ]


@dataclass(frozen=True)
class Counts:
    """What was asked of the device.

    Attributes:
        launches: kernels, products of cuBLAS and fills.
        copies: of any kind; pageable: those between the device and host memory that is not pinned.
        syncs: calls in which the host waits for the device.
        graph_launches: replays of captured graphs.
        refused: calls that are forbidden while a stream is captured.
        stray: launches and copies outside of a capture that was under way, which a replay lacks.
        missing: calls of functions that the null GPU does not implement.
    """

    launches: int
    copies: int
    syncs: int
    pageable: int
    graph_launches: int
    refused: int
    stray: int
    missing: int

    def __sub__(self, other: "Counts") -> "Counts":
        return Counts(*(getattr(self, name) - getattr(other, name) for name in self.__dataclass_fields__))


def is_loaded() -> bool:
    """Whether this process runs on the null GPU."""
    return "NULLGPU" in os.environ


def _library() -> ctypes.CDLL:
    if not is_loaded():
        raise RuntimeError("nullgpu: this process is not on the null GPU, expected `python -m bench.nullgpu SCRIPT`")
    return ctypes.CDLL(LOADED)


def counters() -> Counts:
    """The counts since the process began."""
    found = _Counters.in_dll(_library(), "nullgpu")
    return Counts(*(getattr(found, name) for name in Counts.__dataclass_fields__))


def counted(function: Callable[[], object]) -> Counts:
    """What one call asks of the device."""
    before = counters()
    function()
    return counters() - before


@contextlib.contextmanager
def reads_zero():
    """In here the host reads zeros from the device: no kernel wrote anything, so what lies there is what was before."""
    switch = ctypes.c_int.in_dll(_library(), "nullgpu_reads_zero")
    switch.value = 1
    try:
        yield
    finally:
        switch.value = 0
