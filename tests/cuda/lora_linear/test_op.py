"""lora_linear with backend="cuda", from the op to the kernel: the launcher layer, on the emulated GPU."""

import ctypes
import weakref
from contextlib import nullcontext

import pytest
import torch

from fastpeft import _backend
from fastpeft.cuda import lora_linear as cuda
from fastpeft.ops import lora_linear, lora_linear_shared
from fastpeft.testing import LoraProblem
from tests.cuda.emulator import build

pytestmark = [
    pytest.mark.skipif(build.missing() is not None, reason=f"nothing to emulate with: {build.missing()}"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="S and its gradients are Triton's, here in its interpreter"),
]
FP16 = torch.float16


class Extension:
    """fastpeft._C's lora_linear functions; an integer is 64 bits wide, as the bindings have them."""

    def __init__(self):
        self.library = ctypes.CDLL(str(build.library("lora_linear")))
        self.library.emulator_error_text.restype = ctypes.c_char_p
        self.library.fastpeft_lora_linear_workspace.restype = ctypes.c_int64
        self.calls = []

    def lora_linear_workspace(self, rows):
        return self.library.fastpeft_lora_linear_workspace(ctypes.c_int64(rows))

    def __getattr__(self, name):
        def launch(*arguments):
            *values, device, stream = arguments
            assert device == 0
            self.calls.append(name)
            kinds = {int: ctypes.c_int64, float: ctypes.c_float}
            self.library.emulator_set(ctypes.c_uint64(1), 2, 0)
            if getattr(self.library, f"fastpeft_{name}")(*(kinds[type(v)](v) for v in values), ctypes.c_void_p(stream)):
                raise RuntimeError(self.library.emulator_error_text().decode())

        return launch


@pytest.fixture
def gpu(monkeypatch):
    extension = Extension()
    monkeypatch.setattr(cuda, "_extension", lambda: extension)
    monkeypatch.setattr(cuda, "_place", lambda x: (0, 0))
    monkeypatch.setattr(_backend, "cuda_reason", lambda *_: None)
    return extension


def assert_exact(p):
    found, exact = p.fused("cuda"), p.exact()
    assert {name for name, value in exact.items() if not torch.equal(found[name], value.to(found[name].dtype))} == set()


def problem(outs=(40,), ranks=(8,), **options):
    return LoraProblem.make((21, 48), outs, ranks, FP16, integers=True, **options)


@pytest.mark.parametrize("inside", [False, True], ids=["S by Triton", "S inside"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_one_projection(gpu, dropout, inside):
    """y, S and all gradients, with the mask that every backend draws."""
    with cuda.computing_s_inside() if inside else nullcontext():
        assert_exact(problem(dropout=dropout))
    assert gpu.calls == ["lora_linear_down" if inside else "lora_linear", "lora_linear_backward"]


def test_projections_that_share_x(gpu):
    """One dX: the first by the kernel with all low-rank terms, the others on top of it."""
    assert_exact(problem((40, 16, 24), (8, 16, 8)))
    assert gpu.calls == ["lora_linear"] * 3 + ["lora_linear_backward"]


def test_projections_with_masks_of_their_own(gpu):
    """dX has no single mask then, and is the portable path's."""
    assert_exact(problem((40, 16), (8, 16), dropout=0.5))
    assert gpu.calls == ["lora_linear"] * 2


def test_a_gradient_that_tma_cannot_read(gpu):
    """Expanded, as sum().backward() makes it: the portable path's dX."""
    p = problem()
    x = p.x.detach().requires_grad_()
    operands = x, p.weights[0], p.lora_as[0], p.lora_bs[0]
    lora_linear(*operands, backend="cuda").sum().backward()
    found, x.grad = x.grad, None
    lora_linear(*operands, backend="reference").sum().backward()
    assert torch.equal(found, x.grad)
    assert gpu.calls == ["lora_linear"]


def test_a_projection_without_a_weight(gpu):
    """Its y is the low-rank term alone, by Triton."""
    p = problem((40, 24), (8, 8))
    args = p.x, [p.weights[0], None], list(p.lora_as), list(p.lora_bs)
    found, wanted = lora_linear_shared(*args, backend="cuda"), lora_linear_shared(*args, backend="reference")
    assert all(map(torch.equal, found, wanted))
    assert gpu.calls == ["lora_linear"]


@pytest.mark.parametrize("inside", [False, True], ids=["S by Triton", "S inside"])
def test_a_copy_of_the_bias_lives_until_the_launch(gpu, monkeypatch, inside):
    """Its elements lie apart, so it is copied; where memory is not cached, a copy that nobody holds is unmapped."""
    bias = torch.arange(80, dtype=FP16)[::2]
    copies, alive, contiguous = [], [], torch.Tensor.contiguous

    def copying(t, *args, **kwargs):
        copy = contiguous(t, *args, **kwargs)
        copies.extend([weakref.ref(copy)] if t.data_ptr() == bias.data_ptr() else [])
        return copy

    def place(x):  # the last argument of a launch
        alive.extend(copy() is not None for copy in copies)
        return 0, 0

    monkeypatch.setattr(torch.Tensor, "contiguous", copying)
    monkeypatch.setattr(cuda, "_place", place)
    p = problem()
    operands = p.x, p.weights[0], p.lora_as[0], p.lora_bs[0], bias
    with cuda.computing_s_inside() if inside else nullcontext():
        y = lora_linear(*operands, backend="cuda")
    assert torch.equal(y, lora_linear(*operands, backend="reference"))
    assert set(alive) == {True}  # once, or twice where the call is being recorded
