"""What row_linear reads, writes and keeps: guards, strides, 64-bit offsets, the same bits every time."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import fastpeft
from fastpeft.testing import RowProblem, guarded, poisoned
from tests.support.backends import BACKENDS, BF16, DEVICE, FP16, FP32, served
from tests.support.exactness import assert_exact, assert_same

each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_form = pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])
TENSORS = ("x", "weight", "trained", "bias", "dy")


def integers(shape=(37, 30), columns=False) -> RowProblem:
    return RowProblem.make(shape, 45, 7, FP32, None, DEVICE, columns, integers=True)


@each_form
@each_backend
def test_nothing_is_read_or_written_outside(columns, backend):
    """Operands lie in buffers of NaN; what the op allocates is NaN until written, between guards."""
    problem, checks = integers((37, 70), columns=columns), []

    def guard(tensor):
        view, check = guarded(tensor)
        checks.append(check)
        return view

    inside = problem.map(guard)
    with poisoned():
        found = inside.fused(backend)
    for check in checks:
        check()
    exact = problem.exact()
    assert_same({name: value.double() for name, value in found.items()}, exact)
    assert_same({name: getattr(problem, name) for name in TENSORS}, {name: getattr(inside, name) for name in TENSORS})


@each_form
@each_backend
def test_a_second_backward_finds_everything_unchanged(columns, backend):
    p = integers(columns=columns)
    leaves = [t.clone().requires_grad_() for t in (p.x, p.trained, p.bias)]
    y = fastpeft.ops.row_linear(leaves[0], p.weight, leaves[1], p.index, leaves[2], columns, backend)
    first = torch.autograd.grad(y, leaves, p.dy, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(y, leaves, p.dy)))


def sliced(t):
    big = torch.full([2 * n + 3 for n in t.shape], torch.nan, device=t.device, dtype=t.dtype)
    return big[tuple(slice(1, 1 + 2 * n, 2) for n in t.shape)].copy_(t)


def transposed(t):
    return t.movedim(-1, 0).contiguous().movedim(0, -1)


@each_form
@each_backend
@pytest.mark.parametrize("which", TENSORS)
@pytest.mark.parametrize("change", [sliced, transposed], ids=lambda f: f.__name__)
def test_any_strides(columns, backend, which, change):
    problem = integers((3, 7, 18), columns=columns)
    assert_exact(replace(problem, **{which: change(getattr(problem, which))}), backend)


@each_form
@each_backend
@pytest.mark.parametrize("dim", [0, -1])
@pytest.mark.parametrize("which", ["x", "dy"])
def test_expanded_operands(columns, backend, which, dim):
    """Stride 0: one row or column seen many times, as the gradient of a sum or a mean is."""
    problem = integers((21, 18), columns=columns)
    value = getattr(problem, which)
    assert_exact(replace(problem, **{which: value.narrow(dim, 0, 1).expand_as(value)}), backend)


@each_backend
def test_an_index_of_any_stride(backend):
    p = integers()
    assert_exact(replace(p, index=torch.stack([p.index, p.index * 0 - 5], 1)[:, 0]), backend)


def test_an_index_that_does_not_exist_reads_nothing():
    """On a GPU nobody looks at the values of an index, so the kernel must be safe with any."""
    kernels = pytest.importorskip("fastpeft.kernels.row_linear", reason="Triton is not installed")
    p = integers()
    dy, check = guarded(p.dy)
    found = kernels.backward(dy, p.x, torch.tensor([-1, 45, 44], device=DEVICE), FP32)
    assert not found[:2].any()
    assert torch.equal(found[2], p.dy[:, 44] @ p.x)
    check()


BIG = """
import torch
from fastpeft import ops
from fastpeft.testing import integer_inputs

def apart(t, dim):  # t with its rows or columns so far apart that the last offset needs 33 bits; few pages are touched
    stride = 2**30 if t.shape[dim] == 4 else 2**25
    buffer = torch.empty(stride * (t.shape[dim] - 1) + 256, dtype=torch.float16, device=DEVICE)
    return torch.as_strided(buffer, t.shape, (stride, 1) if dim == 0 else (1, stride)).copy_(t)

def run(x, dy, columns, index):
    part = weight.index_select(int(columns), index).requires_grad_()
    y = ops.row_linear(x.requires_grad_(), weight, part, index, None, columns, BACKEND)
    return [y, *torch.autograd.grad(y, (x, part), dy)]

for m, k in ((4, 4), (130, 4), (4, 130)):
    x, dy, weight = integer_inputs((m, k), (m, 4), (4, k), dtype=torch.float16, device=DEVICE)
    index = torch.tensor([3, 0], device=DEVICE)
    far = torch.empty(2**31 + 1, dtype=torch.int64, device=DEVICE)[:: 2**31].copy_(index)
    for columns in (False, True):
        wanted = run(x.clone(), dy, columns, index)
        for name, found in (
            ("x", run(apart(x, 0), dy, columns, index)),
            ("x", run(apart(x, 1), dy, columns, index)),
            ("dy", run(x.clone(), apart(dy, 0), columns, index)),
            ("dy", run(x.clone(), apart(dy, 1), columns, index)),
            ("index", run(x.clone(), dy, columns, far)),
        ):
            assert all(map(torch.equal, wanted, found)), (name, m, k, columns)
"""


@each_backend
def test_offsets_are_64_bit(backend):
    """In a process of its own: where an offset is cut to 32 bits, wrong elements are read, or the process dies."""
    settings = f"DEVICE, BACKEND = {DEVICE.type!r}, {backend!r}\n"
    done = subprocess.run([sys.executable, "-c", settings + BIG], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@each_form
@pytest.mark.parametrize(("backend", "dtype", "trained"), served((FP32, FP32), (FP16, FP32), (BF16, BF16)))
def test_the_same_bits_every_time(columns, backend, dtype, trained):
    problem = RowProblem.make((131, 260), 45, 9, dtype, trained, DEVICE, columns)
    first = problem.fused(backend)
    for _ in range(2 if DEVICE.type == "cpu" else 99):
        assert_same(first, problem.fused(backend))


@each_backend
def test_a_chosen_row_does_not_depend_on_the_others(backend):
    """Bit for bit, NaN in dY's other columns included."""
    p = RowProblem.make((131, 96), 45, 9, device=DEVICE)
    dy = torch.full_like(p.dy, torch.nan)
    dy[:, p.index[2]] = p.dy[:, p.index[2]]
    one, other = p.fused(backend)["dtrained"], replace(p, dy=dy).fused(backend)["dtrained"]
    assert torch.equal(one[2], other[2])


@each_backend
@each_form
def test_what_is_kept_for_backward(backend, columns):
    """Rows: x. Columns: those of x that are chosen. Nothing of x where only the bias is trained."""
    p = RowProblem.make((33, 64), 48, 8, device=DEVICE, columns=columns)
    part, kept = p.trained.clone().requires_grad_(), {}
    aside = {t.untyped_storage().data_ptr() for t in (p.weight, part, p.index)}

    def pack(t):
        if t.untyped_storage().data_ptr() not in aside:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    def run():
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = fastpeft.ops.row_linear(p.x, p.weight, part, p.index, bias, columns, backend)
        return sum(kept.values()), y

    bias = p.bias.clone().requires_grad_()
    assert run()[0] == 33 * (8 if columns else 64) * 4
    part.requires_grad_(False)
    total, y = run()
    assert total == 0
    assert y.requires_grad
