"""Launches of kernels by CUDA's driver, without a detour through Triton's launcher, which binds arguments anew.

All that a call of the driver takes is written once, into a ``Frame``; a launch then costs as much as any call of a C
function without arguments.
"""

import ctypes
import functools
from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

_INVALID_CONTEXT = 201


class Launch(NamedTuple):
    """A kernel's launch: the driver's handle of it, blocks, threads of a block, bytes of shared memory, parameters.

    The parameters are given as numbers of words.
    """

    function: int
    grid: tuple[int, int, int]
    threads: int
    shared: int
    parameters: tuple[int, ...]


class _Config(ctypes.Structure):
    """``CUlaunchConfig``."""

    _fields_ = [(name, ctypes.c_uint) for name in ("x", "y", "z", "threads", "threads_y", "threads_z", "shared")]
    _fields_ += [("stream", ctypes.c_void_p), ("attributes", ctypes.c_void_p), ("count", ctypes.c_uint)]


class Frame:
    """What a program's launches read, for one run at a time.

    Args:
        words: eight bytes for each parameter that launches take, as numbers; pointers are written before a launch.
        launches: in their order.
    """

    def __init__(self, words: array, launches: Sequence[Launch]):
        self.words, self.stream = words[:], 0
        first = self.words.buffer_info()[0]
        self._configs = [_Config(*each.grid, each.threads, 1, 1, each.shared, 0, 0, 0) for each in launches]
        # The arguments of cuLaunchKernelEx: preconverted, since ctypes would convert them anew at every call.
        self.launches = [
            (
                ctypes.byref(config),
                ctypes.c_void_p(each.function),
                (ctypes.c_void_p * len(each.parameters))(*(first + 8 * word for word in each.parameters)),
                None,
            )
            for config, each in zip(self._configs, launches, strict=True)
        ]

    def to(self, stream: int) -> None:
        """From now on it launches in this stream, the driver's handle of one."""
        self.stream = stream
        for config in self._configs:
            config.stream = stream


@functools.cache
def launcher() -> Any:
    """The driver's function, which returns an error's number; to be called with one of a frame's ``launches``."""
    return _driver().cuLaunchKernelEx


def failed(error: int, device: int, arguments: tuple) -> None:
    """Launch again where it failed for the want of a context only.

    Args:
        error: what ``launcher()`` returned.
        device: its number; arguments: of the launch.

    Raises:
        RuntimeError: the driver refuses, in its words.
    """
    if error == _INVALID_CONTEXT:  # a thread that has called no function of the runtime yet
        _enter_context(device)
        error = launcher()(*arguments)
    _check(error, "cuLaunchKernel")


@functools.cache
def _driver() -> Any:
    return ctypes.PyDLL("libcuda.so.1")  # keeps Python's lock: a launch returns at once


def _enter_context(device: int) -> None:
    handle, context = ctypes.c_int(), ctypes.c_void_p()
    _check(_driver().cuDeviceGet(ctypes.byref(handle), device), "cuDeviceGet")
    _check(_driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), handle), "cuDevicePrimaryCtxRetain")
    _check(_driver().cuCtxSetCurrent(context), "cuCtxSetCurrent")


def _check(error: int, what: str) -> None:
    if error:
        said = ctypes.c_char_p()
        _driver().cuGetErrorString(error, ctypes.byref(said))
        words = said.value.decode() if said.value else "unknown error"
        raise RuntimeError(f"fastpeft: {what}: {words} ({error})")
