"""Launches of kernels by CUDA's driver, without a detour through Triton's launcher, which binds arguments anew."""

import ctypes
import functools
from typing import Any

_INVALID_CONTEXT = 201


@functools.cache
def _driver() -> Any:
    driver = ctypes.PyDLL("libcuda.so.1")  # keeps Python's lock: a launch returns at once
    number, pointer = ctypes.c_uint, ctypes.c_void_p
    driver.cuLaunchKernel.argtypes = [pointer, *[number] * 7, pointer, pointer, pointer]
    return driver


def launch(
    device: int, function: int, grid: tuple[int, int, int], threads: int, shared: int, stream: int, parameters: Any
) -> None:
    """Launch a kernel.

    Args:
        device: its number.
        function: the driver's handle of the kernel.
        grid: how many blocks.
        threads: in a block.
        shared: bytes of shared memory of a block.
        stream: the driver's handle of the stream.
        parameters: an array of the addresses of the kernel's parameters.

    Raises:
        RuntimeError: the driver refuses, in its words.
    """
    x, y, z = grid
    error = _driver().cuLaunchKernel(function, x, y, z, threads, 1, 1, shared, stream, parameters, None)
    if error == _INVALID_CONTEXT:  # a thread that has called no function of the runtime yet
        _enter_context(device)
        error = _driver().cuLaunchKernel(function, x, y, z, threads, 1, 1, shared, stream, parameters, None)
    _check(error, "cuLaunchKernel")


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
