"""lora_linear's memory: what it reads, writes and keeps; any strides; 64-bit offsets; the same bits every time."""

import subprocess
import sys

import pytest
import torch

import fastpeft
from fastpeft.testing import LoraProblem, guarded, poisoned
from tests.support.backends import BACKENDS, BF16, DEVICE, FP16, FP32, served
from tests.support.exactness import assert_same

TENSORS = ("x", "weights", "lora_as", "lora_bs", "biases", "dys")
FORMS = {"lora_linear": ((45,), (12,)), "lora_linear_shared": ((45, 30), (12, 9))}
each_backend = pytest.mark.parametrize("backend", BACKENDS)
form = pytest.mark.parametrize("form", FORMS)


def integers(shape, form="lora_linear", dropout=0.5):
    return LoraProblem.make(shape, *FORMS[form], FP32, device=DEVICE, dropout=dropout, integers=True)


def every_tensor(problem):
    return [problem.x, *(t for name in TENSORS[1:] for t in getattr(problem, name))]


@form
@each_backend
def test_nothing_is_read_or_written_outside(form, backend):
    """Operands lie in buffers of NaN; what the op allocates is NaN until written, between guards."""
    problem, checks = integers((37, 70), form), []

    def guard(tensor):
        view, check = guarded(tensor)
        checks.append(check)
        return view

    inside = problem.map(guard)
    with poisoned():
        found = inside.fused(backend)
    for check in checks:
        check()
    assert_same(problem.exact(), found)
    assert_same(
        dict(enumerate(every_tensor(problem))), dict(enumerate(every_tensor(inside)))
    )  # nor the operands written


@each_backend
def test_a_second_backward_finds_everything_unchanged(backend):
    p = integers((21, 18))
    leaves = [t.clone().requires_grad_() for t in (p.x, p.weights[0], p.lora_as[0], p.lora_bs[0], p.biases[0])]
    y = fastpeft.ops.lora_linear(*leaves, 0.5, 0.5, 7, backend)
    first = torch.autograd.grad(y, leaves, p.dys[0], retain_graph=True)
    second = torch.autograd.grad(y, leaves, p.dys[0])
    assert_same(dict(enumerate(first)), dict(enumerate(second)))


def sliced(t):
    big = torch.full([2 * n + 3 for n in t.shape], torch.nan, device=t.device, dtype=t.dtype)
    return big[tuple(slice(1, 1 + 2 * n, 2) for n in t.shape)].copy_(t)


def concatenated(t):
    return torch.cat([torch.full_like(t, torch.nan), t, torch.full_like(t, torch.nan)], -1).split(t.shape[-1], -1)[1]


def transposed(t):
    return t.movedim(-1, 0).contiguous().movedim(0, -1)


def reversed_dimensions(t):
    order = list(range(t.dim()))[::-1]
    return t.permute(order).contiguous().permute(order)


@form
@each_backend
@pytest.mark.parametrize("which", TENSORS)
@pytest.mark.parametrize("change", [sliced, concatenated, transposed, reversed_dimensions], ids=lambda f: f.__name__)
def test_any_strides(form, backend, which, change):
    problem = integers((3, 7, 18), form)
    wanted = problem.fused(backend)
    moved = change(problem.x) if which == "x" else tuple(map(change, getattr(problem, which)))
    strided = LoraProblem(**{**vars(problem), which: moved})
    assert_same(wanted, strided.fused(backend))


@each_backend
@pytest.mark.parametrize("which", TENSORS)
@pytest.mark.parametrize("dim", [0, -1])
def test_expanded_operands(backend, which, dim):
    """Stride 0: one row or column seen many times, as the gradient of a sum or a mean is."""
    problem = integers((21, 18))

    def change(t):
        return t.narrow(dim, 0, 1).expand_as(t)

    moved = change(problem.x) if which == "x" else tuple(map(change, getattr(problem, which)))
    problem = LoraProblem(**{**vars(problem), which: moved})
    assert_same(problem.exact(), problem.fused(backend))


BIG = """
import torch
from fastpeft import ops
from fastpeft.testing import integer_inputs

def apart(t, dim):  # t with its rows or columns so far apart that the last offset needs 33 bits; few pages are touched
    stride = 2**30 if t.shape[dim] == 4 else 2**25  # of 130 columns: a block of 64 passes 2**31 too
    buffer = torch.empty(stride * (t.shape[dim] - 1) + 256, dtype=torch.float16, device=DEVICE)
    return torch.as_strided(buffer, t.shape, (stride, 1) if dim == 0 else (1, stride)).copy_(t)

def run(operands):
    *leaves, dy = [t.detach().requires_grad_() for t in operands.values()]
    y = ops.lora_linear(*leaves, 0.5, 0.5, 3, BACKEND)
    return [y, *torch.autograd.grad(y, leaves, dy)]

for k in (4, 130):
    shapes = {"x": (4, k), "weight": (4, k), "lora_a": (4, k), "lora_b": (4, 4), "bias": (4,), "dy": (4, 4)}
    plain = dict(zip(shapes, integer_inputs(*shapes.values(), dtype=torch.float16, device=DEVICE)))
    wanted = run(plain)
    for name in ("x", "weight", "lora_a", "lora_b", "dy"):
        for dim in (0, 1):
            found = run(plain | {name: apart(plain[name], dim)})
            assert all(map(torch.equal, wanted, found)), (k, name, dim)
"""


@each_backend
def test_offsets_are_64_bit(backend):
    """In a process of its own: where an offset is cut to 32 bits, wrong elements are read, or the process dies."""
    settings = f"DEVICE, BACKEND = {DEVICE.type!r}, {backend!r}\n"
    done = subprocess.run([sys.executable, "-c", settings + BIG], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@form
@pytest.mark.parametrize(
    ("backend", "dtype", "adapter"), served((FP32, FP32), (FP16, FP32), (BF16, BF16), (BF16, FP32))
)
def test_the_same_bits_every_time(form, backend, dtype, adapter):
    problem = LoraProblem.make((131, 260), *FORMS[form], dtype, adapter, DEVICE, 0.1)
    first = problem.fused(backend)
    for _ in range(2 if DEVICE.type == "cpu" else 99):
        assert_same(first, problem.fused(backend))


@each_backend
def test_a_row_does_not_depend_on_the_other_rows(backend):
    """Bit for bit, NaN and infinity in the other rows included."""
    p = LoraProblem.make((131, 96), (45,), (12,), device=DEVICE, dropout=0.1)
    x = p.x.clone()
    x[:70], x[71:] = torch.nan, torch.inf
    dy = p.dys[0].clone()
    dy[:70], dy[71:] = torch.inf, torch.nan
    one, other = p.fused(backend), LoraProblem(**{**vars(p), "x": x, "dys": (dy,)}).fused(backend)
    assert torch.equal(one["y0"][70], other["y0"][70])
    assert torch.equal(one["dx"][70], other["dx"][70])


def bytes_kept(call, *parameters) -> tuple[int, torch.Tensor]:
    """Bytes that autograd keeps for backward, parameters and the seed's 8 bytes aside."""
    kept, aside = {}, {p.untyped_storage().data_ptr() for p in parameters}

    def pack(t):
        if t.untyped_storage().data_ptr() not in aside and t.dtype != torch.int64:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = call()
    return sum(kept.values()), y


@pytest.mark.parametrize(("backend", "dtype", "adapter"), served((FP32, FP32), (FP16, FP32), (BF16, FP32)))
def test_only_x_and_s_are_kept_for_backward(backend, dtype, adapter):
    """Not the mask, not drop(x), not a float32 copy of x. With A frozen (LoRA-FA) not even x."""
    p = LoraProblem.make((33, 64), (48,), (8,), dtype, adapter, DEVICE)
    weight, a, b = p.weights[0], p.lora_as[0].requires_grad_(), p.lora_bs[0].requires_grad_()
    x = p.x.requires_grad_()

    def call():
        return fastpeft.ops.lora_linear(x, weight, a, b, None, 2.0, 0.1, 3, backend)

    x_bytes, s_bytes = 33 * 64 * dtype.itemsize, 33 * 8 * adapter.itemsize
    assert bytes_kept(call, weight, a, b)[0] == x_bytes + s_bytes
    a.requires_grad_(False)
    assert bytes_kept(call, weight, a, b)[0] == s_bytes
    b.requires_grad_(False)
    kept, y = bytes_kept(call, weight, a, b)
    assert kept == 0
    y.backward(p.dys[0])
    assert x.grad is not None
