"""A launch that was recorded passes the kernel what a new call's tensors are, wherever in their storage they lie.

Kernels are C functions here, behind a stub in place of CUDA's driver, so that launches run on CPU tensors.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import host_extension

STUB = Path(__file__).parents[1] / "support" / "stub_driver.c"

# In a process of its own: Triton would take the stub for a driver.
PROGRAM = """
import ctypes, sys, threading
from types import SimpleNamespace as Facts

stub = ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
import torch
from fastpeft import _plan, _tape

kernel = Facts(arg_names=["both", "y_ptr", "ALPHA", "beta", "n", "one"])
signature = {"both": ("*fp32", "*fp32"), "y_ptr": "*fp32", "ALPHA": "fp32", "beta": "fp64"}
signature |= {"n": "i64", "one": "constexpr"}
address = ctypes.cast(stub.axpbz, ctypes.c_void_p).value
data = dict(num_warps=4, warp_size=32, shared=0, num_ctas=1, name="axpbz")
compiled = Facts(function=address, metadata=Facts(**data), src=Facts(signature=signature))
python = 0

@_plan.planned
def op(x, z, alpha):
    global python
    python += 1
    part, room = z[1:], x.new_empty(2, x.numel() + 3)
    y = room[1, 3:]
    y.copy_(alpha * x + 0.25 * part + 7)  # what the kernel does, in PyTorch
    _tape.launched(kernel, compiled, (7,), [(x, part), y, alpha, 0.25, x.numel(), 1])
    return [y]

def check(n, alpha):
    x, z = torch.randn(n), torch.randn(n + 1)
    (y,) = op(x, z, alpha)
    torch.testing.assert_close(y, alpha * x + 0.25 * z[1:] + 7)

for n in (4, 9):
    for alpha in (0.5, 2.0):
        for _ in range(4):
            check(n, alpha)
launches = ctypes.c_int.in_dll(stub, "launches")
assert (python, launches.value) == (8, 8), (python, launches.value)  # twice for each kind, then as plans
assert not _plan.refusals, _plan.refusals

ctypes.c_int.in_dll(stub, "fail_with").value = 201  # a thread without a context: it is entered once
check(4, 0.5)
assert ctypes.c_int.in_dll(stub, "contexts").value == 1
ctypes.c_int.in_dll(stub, "fail_with").value = 700
try:
    check(4, 0.5)
except RuntimeError as error:
    assert "cuLaunchKernel: a stub's error (700)" in str(error), error
else:
    raise SystemExit("a failed launch went unnoticed")
print("ok")
"""


@pytest.fixture(scope="module")
def stub(tmp_path_factory):
    host_extension.loaded()
    compiler = shutil.which("gcc") or pytest.skip("needs a C compiler")
    path = tmp_path_factory.mktemp("stub") / "libcuda.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", STUB, "-o", path], check=True)
    return path


@pytest.mark.parametrize("host", ["", "python"])
def test_recorded_launches_on_new_tensors(stub, host):
    command, environment = [sys.executable, "-c", PROGRAM, stub], os.environ | {"FASTPEFT_HOST": host}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"num_ctas": 2}, "more than a plain launch"),
        ({"global_scratch_size": 16}, "more than a plain launch"),
        ({"launch_pdl": True}, "more than a plain launch"),
        ({"signature": "fp16"}, "a parameter of type fp16"),
        (None, "Triton's interpreter"),
    ],
)
def test_launches_that_cannot_be_repeated_are_refused(changed, reason):
    import torch

    from fastpeft import _tape
    from tests.support.compiled import kernel_of

    x = torch.ones(4)
    with _tape.Tape([x]) as tape:
        _tape.launched(*kernel_of(changed), (1,), [x, 2.0])
    assert reason in tape.refused
