"""Launches on meta tensors, each compiled for a GPU that is not here, with what a model needs to know of it."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction, MockTensor

# What PyTorch does to a tensor without a kernel.
VIEWS = ("view", "expand", "t.", "transpose", "detach", "alias", "split", "slice", "select", "unsqueeze", "squeeze")
VIEWS += ("reshape", "permute", "as_strided", "empty", "new_empty", "unbind", "narrow", "lift_fresh")


@dataclass(frozen=True)
class Launch:
    """One launch of a Triton kernel.

    Attributes:
        name: the kernel's.
        grid: programs along each axis.
        tensors: the tensors among its arguments, by the parameter's name.
        constants: the compile-time arguments by name: tile sizes, warps, stages.
        kernel: what Triton compiled.
        seconds: that took.
    """

    name: str
    grid: tuple[int, ...]
    tensors: dict[str, Tensor]
    constants: dict[str, Any]
    kernel: Any
    seconds: float


@dataclass(frozen=True)
class Other:
    """One kernel of PyTorch's, and the bytes it reads and writes."""

    name: str
    bytes: int


class _Driver:
    """A GPU as far as a compilation asks. The device's number is the architecture: compiled kernels are kept apart."""

    def __init__(self, architecture: int):
        self.architecture = architecture

    def get_current_target(self):
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self):
        return self.architecture

    def get_current_stream(self, device):
        return 0


@contextlib.contextmanager
def compiling(architecture: int, record: Callable[[Launch], None]) -> Iterator[None]:
    """Inside, every launch compiles for ``architecture`` instead, and is recorded."""
    from fastpeft import _device

    run, capability = JITFunction.run, _device.capability

    def compile_only(self, *args, grid, warmup, **kwargs):
        def fake(value):
            if isinstance(value, tuple):
                return tuple(map(fake, value))
            return MockTensor(value.dtype) if isinstance(value, Tensor) else value

        began = time.perf_counter()
        kernel = run(self, *map(fake, args), grid=grid, warmup=True, **{n: fake(value) for n, value in kwargs.items()})
        tensors = dict(_tensors(zip((p.name for p in self.params), args)))
        constants = {n: value for n, value in kwargs.items() if not isinstance(value, Tensor)}
        record(Launch(self.__name__, tuple(grid), tensors, constants, kernel, time.perf_counter() - began))
        return kernel

    triton.runtime.driver.set_active(_Driver(architecture))
    JITFunction.run = compile_only
    _device.capability = lambda _: architecture
    try:
        yield
    finally:
        JITFunction.run = run
        _device.capability = capability


def _tensors(named) -> Iterator[tuple[str, Tensor]]:
    for name, value in named:
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, tuple):
            yield from _tensors((f"{name}.{i}", item) for i, item in enumerate(value))


def size_of(tensor: Tensor) -> int:
    """Bytes."""
    return tensor.numel() * tensor.element_size()


class _PyTorchKernels(TorchDispatchMode):
    def __init__(self, record: Callable[[Other], None]):
        super().__init__()
        self.record = record

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        name = str(function).removeprefix("aten.")
        if not name.startswith(VIEWS):
            moved = [t for _, t in _tensors([("", tuple(_flat(args))), ("", tuple(_flat([found])))])]
            self.record(Other(name, sum(map(size_of, moved))))
        return found


def _flat(values) -> Iterator:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _flat(value)
        else:
            yield value


def launches(function: Callable[[], object], architecture: int = 90) -> list[Launch | Other]:
    """All that ``function``, called on meta tensors, would launch on a GPU, in order."""
    found: list[Launch | Other] = []
    with compiling(architecture, found.append), _PyTorchKernels(found.append):
        function()
    return found
