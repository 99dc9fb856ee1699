"""bottleneck's memory: what it reads, writes and keeps; any strides; 64-bit offsets; the same bits every time."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from fastpeft import ops
from fastpeft.testing import BottleneckProblem, guarded, poisoned
from tests.support.backends import BACKENDS, DEVICE, FP16, FP32, served
from tests.support.exactness import assert_same

each_backend = pytest.mark.parametrize("backend", BACKENDS)
FORMS = {"one adapter": None, "slots": 3}
form = pytest.mark.parametrize("form", FORMS)


def problem_of(form, shape=(21, 70), hidden=12, **options):
    options = {"dtype": FP32, "device": DEVICE, "dropout": 0.5, "scale": "channel", "integers": True} | options
    return BottleneckProblem.make(shape, hidden, out=45, slots=FORMS[form], **options)


@form
@each_backend
@pytest.mark.parametrize("path", ["two kernels", "one kernel"])
def test_nothing_is_read_or_written_outside(form, backend, path, monkeypatch):
    """Operands lie in buffers of NaN; what the op allocates is NaN until written, between guards."""
    if backend == "triton" and path == "one kernel":
        kernels = pytest.importorskip("fastpeft.kernels.bottleneck", reason="Triton is not installed")
        monkeypatch.setattr(kernels, "FUSED_BLOCKS", 0)
    problem, checks = problem_of(form), []

    def guard(tensor):
        view, check = guarded(tensor)
        checks.append(check)
        return view

    inside = problem.map(guard)
    with poisoned():
        found = inside.fused(backend, 64 if path == "one kernel" else 16)
    for check in checks:
        check()
    assert_same(problem.exact(), found)
    for name in problem.weights:
        assert torch.equal(problem.weights[name], inside.weights[name])
    assert torch.equal(problem.x, inside.x)


@each_backend
@pytest.mark.parametrize("norm", ["layer", "rms"])
@form
def test_nothing_is_read_outside_by_a_norm(backend, norm, form):
    problem, checks = problem_of(form, norm=norm, integers=False), []

    def guard(tensor):
        view, check = guarded(tensor)
        checks.append(check)
        return view

    with poisoned():
        found = problem.map(guard).fused(backend)
    for check in checks:
        check()
    for name, value in problem.exact().items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-3, atol=1e-3)


def sliced(t):
    big = torch.full([2 * n + 3 for n in t.shape], torch.nan, device=t.device, dtype=t.dtype)
    return big[tuple(slice(1, 1 + 2 * n, 2) for n in t.shape)].copy_(t)


def reversed_dimensions(t):
    order = list(range(t.dim()))[::-1]
    return t.permute(order).contiguous().permute(order)


@form
@each_backend
@pytest.mark.parametrize("change", [sliced, reversed_dimensions], ids=lambda f: f.__name__)
def test_any_strides(form, backend, change):
    problem = problem_of(form, (15, 18))
    assert_same(problem.exact(), problem.map(change).fused(backend))


@each_backend
@pytest.mark.parametrize("dim", [0, 1])
def test_expanded_operands(backend, dim):
    problem = problem_of("one adapter", (15, 18))

    def change(t):
        return t.narrow(dim, 0, 1).expand_as(t)

    problem = replace(problem, x=change(problem.x), residual=change(problem.residual), dy=change(problem.dy))
    assert_same(problem.exact(), problem.fused(backend))


BIG = """
import torch
from fastpeft import ops
from fastpeft.testing import integer_inputs

def apart(t, dim):  # t with one dimension so far apart that the last offset needs 33 bits; few pages are touched
    stride, strides = 2**30 if t.shape[dim] <= 4 else 2**25, list(t.contiguous().stride())
    strides[dim] = stride
    buffer = torch.empty(stride * (t.shape[dim] - 1) + 4096, dtype=t.dtype, device=DEVICE)
    return torch.as_strided(buffer, t.shape, strides).copy_(t)

k, s = 130, (4,) if SLOTS else ()
slots = torch.tensor([3, -1, 0, 3], dtype=torch.int32, device=DEVICE) if SLOTS else None
shapes = {"x": (4, k), "down_weight": (*s, 4, k), "down_bias": (*s, 4), "up_weight": (*s, 4, 4), "up_bias": (*s, 4),
          "residual": (4, 4), "scale": (*s, 4), "norm_weight": (*s, k), "norm_bias": (*s, k), "dy": (4, 4)}
plain = dict(zip(shapes, integer_inputs(*shapes.values(), dtype=torch.float16, device=DEVICE)))

def run(dy, **operands):
    leaves = {name: t.detach().requires_grad_() for name, t in operands.items()}
    y = ops.bottleneck(**leaves, slots=slots, dropout=0.5, seed=1, backend=BACKEND)
    return [y, *torch.autograd.grad(y, list(leaves.values()), dy)]

wanted = run(**{name: t.clone() for name, t in plain.items()})
for name, shape in shapes.items():
    for dim in range(len(shape)):
        operands = {other: t.clone() for other, t in plain.items()} | {name: apart(plain[name], dim)}
        found = run(**operands)
        assert all(map(torch.equal, wanted, found)), (name, dim)
"""


@each_backend
@form
def test_offsets_are_64_bit(backend, form):
    """Past 2**31 in every dimension of every operand. In a process of its own: where an offset is cut to 32 bits, wrong
    elements are read, or the process dies."""
    settings = f"DEVICE, BACKEND, SLOTS = {DEVICE.type!r}, {backend!r}, {FORMS[form]}\n"
    done = subprocess.run([sys.executable, "-c", settings + BIG], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@form
@pytest.mark.parametrize(("backend", "dtype", "wide"), served((FP32, FP32), (FP16, FP32)))
def test_the_same_bits_every_time(form, backend, dtype, wide):
    options = {"weights_dtype": wide, "norm": "layer", "integers": False}
    problem = problem_of(form, (70, 130), dtype=dtype, **options)
    first = problem.fused(backend)
    for _ in range(1 if DEVICE.type == "cpu" else 99):
        assert_same(first, problem.fused(backend))


@each_backend
def test_a_second_backward_finds_everything_unchanged(backend):
    p = problem_of("one adapter", norm="layer")
    leaves = {name: t.clone().requires_grad_() for name, t in ({"x": p.x, "residual": p.residual} | p.weights).items()}
    y = ops.bottleneck(backend=backend, **leaves, **p.settings)
    first = torch.autograd.grad(y, list(leaves.values()), p.dy, retain_graph=True)
    second = torch.autograd.grad(y, list(leaves.values()), p.dy)
    assert all(map(torch.equal, first, second))


def kept_bytes(call, weights):
    own, kept = {t.untyped_storage().data_ptr() for t in weights}, {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call()
    return sum(kept.values())


@pytest.mark.parametrize("norm", [None, "layer"])
@pytest.mark.parametrize(("backend", "dtype", "wide"), served((FP32, FP32), (FP16, FP16)))
def test_what_is_kept_for_backward(backend, dtype, wide, norm):
    """x, and the hidden values on the CPU or two numbers a row from kernels; not the mask, norm(x), s · u, residual."""
    options = {"activation": "gelu", "scale": "channel", "dropout": 0.5, "norm": norm}
    p = BottleneckProblem.make((33, 64), 8, dtype=dtype, weights_dtype=wide, device=DEVICE, **options)
    leaves = {name: t.clone().requires_grad_() for name, t in ({"x": p.x, "residual": p.residual} | p.weights).items()}
    weights = [leaves[name] for name in p.weights]
    found = kept_bytes(lambda: ops.bottleneck(backend=backend, **leaves, **p.settings), weights)
    beside = 33 * 8 * dtype.itemsize
    if backend == "triton":
        beside = 2 * 33 * 4 if norm else 0
    seed = 8
    assert found == 33 * 64 * dtype.itemsize + beside + seed
    eager = kept_bytes(lambda: p.eager(), weights)
    assert found <= 0.6 * eager


@each_backend
def test_a_frozen_adapter_keeps_no_x(backend):
    """Where the CPU keeps the hidden values, x would serve nobody."""
    p = BottleneckProblem.make((33, 64), 8, dtype=FP32, device=DEVICE)
    x = p.x.clone().requires_grad_()
    call = {"residual": None, "backend": backend} | p.weights | p.settings
    found = kept_bytes(lambda: ops.bottleneck(x * 1.0, **call), p.weights.values())
    assert found == (33 * 8 if backend == "reference" else 33 * 64) * 4
