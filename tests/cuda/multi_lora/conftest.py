"""The emulated GPU in the place of the real one."""

import pytest

from fastpeft import _backend
from fastpeft.cuda import multi_lora as cuda
from tests.cuda.emulator.multi_lora import Extension
from tests.cuda.emulator.multi_lora_problems import CLUSTER


@pytest.fixture(scope="module")
def extension():
    return Extension()


@pytest.fixture
def gpu(request, extension, monkeypatch):
    """The emulated GPU in place of fastpeft._C and of the device, for tensors on the CPU."""
    extension.seed, extension.ahead, extension.calls = 1, [], []
    monkeypatch.setattr(cuda, "_extension", lambda: extension)
    monkeypatch.setattr(cuda, "_capability", lambda x: getattr(request, "param", CLUSTER))
    monkeypatch.setattr(cuda, "_place", lambda x: (0, 0))
    monkeypatch.setattr(_backend, "cuda_reason", lambda *_: None)
    return extension
