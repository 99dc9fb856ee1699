"""multi_lora's memory: what it reads, writes and keeps; any strides; 64-bit offsets; the same bits every time."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from fastpeft.ops import multi_lora, multi_lora_, route
from fastpeft.ops.routing import TILES
from fastpeft.reference import Slots
from fastpeft.testing import MultiLoraProblem, guarded, poisoned
from tests.support.backends import BACKENDS, DEVICE, FP16, FP32, served
from tests.support.exactness import assert_same

each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_tile = pytest.mark.parametrize("tile", TILES)
FORMS = {"multi_lora": ((45,), (12,)), "multi_lora_shared": ((45, 30), (12, 9))}
form = pytest.mark.parametrize("form", FORMS)


def integers(form="multi_lora", tokens=37, k=70, dropout=0.5):
    return MultiLoraProblem.make(tokens, k, *FORMS[form], 3, FP32, device=DEVICE, dropout=dropout, integers=True)


def operands(problem):
    return [problem.x, *problem.lora_as, *problem.lora_bs, *problem.ys, *problem.dys]


@form
@each_tile
@each_backend
def test_nothing_is_read_or_written_outside(form, tile, backend):
    """Operands lie in buffers of NaN; what the op allocates is NaN until written, between guards."""
    problem, checks = integers(form), []

    def guard(tensor):
        view, check = guarded(tensor)
        checks.append(check)
        return view

    inside = problem.map(guard)
    with poisoned():
        found = inside.fused(backend, tile)
    for check in checks:
        check()
    assert_same(problem.exact(), found)
    for before, after in zip(operands(problem), operands(inside), strict=True):
        assert torch.equal(before.nan_to_num(), after.nan_to_num())  # nor the operands written


@each_tile
@each_backend
def test_in_place_writes_only_tokens_that_have_an_adapter(tile, backend):
    p = integers(dropout=0.0)
    y, check = guarded(p.ys[0])
    y[p.token_slots == -1] = torch.nan
    routing = route(p.token_slots, 3, tile, backend)
    with poisoned():
        multi_lora_(y, p.x, p.lora_as[0], p.lora_bs[0], routing, p.scales, p.ranks, backend)
    check()
    wanted = p.exact()["y0"]
    mine = p.token_slots >= 0
    assert torch.equal(y[mine].double(), wanted[mine])
    assert y[~mine].isnan().all()


@each_tile
@pytest.mark.parametrize("count", [1, 3])
def test_work_ends_at_the_true_rank(tile, count):
    """What lies beyond is finite here, so that whoever computed with it would leave numbers in S."""
    kernels = pytest.importorskip("fastpeft.kernels.multi_lora", reason="Triton is not installed")
    lora_as = [torch.ones(2, 12, 8, device=DEVICE) for _ in range(count)]
    ranks = torch.tensor([[12, 5], [12, 3], [12, 11]], dtype=torch.int32, device=DEVICE)[:count]
    routing = route(torch.ones(7, dtype=torch.int32, device=DEVICE), 2, tile, "triton")
    with poisoned():
        slots = Slots(torch.ones(2, device=DEVICE), ranks)
        s = kernels.shrink(torch.ones(7, 8, device=DEVICE), lora_as, routing, slots)
    for s_p, rank in zip(s[0].split(12, 1), ranks[:, 1].tolist(), strict=True):
        assert (s_p[:, :rank] == 8).all()
        assert s_p[:, rank:].isnan().all()


def sliced(t):
    big = torch.full([2 * n + 3 for n in t.shape], torch.nan, device=t.device, dtype=t.dtype)
    return big[tuple(slice(1, 1 + 2 * n, 2) for n in t.shape)].copy_(t)


def reversed_dimensions(t):
    order = list(range(t.dim()))[::-1]
    return t.permute(order).contiguous().permute(order)


@form
@each_backend
@pytest.mark.parametrize("which", ["x", "lora_as", "lora_bs", "ys", "dys"])
@pytest.mark.parametrize("change", [sliced, reversed_dimensions], ids=lambda f: f.__name__)
def test_any_strides(form, backend, which, change):
    problem = integers(form, tokens=15, k=18)
    moved = change(problem.x) if which == "x" else tuple(map(change, getattr(problem, which)))
    assert_same(problem.fused(backend), replace(problem, **{which: moved}).fused(backend))


@each_tile
@each_backend
def test_slices_of_different_strides(tile, backend):
    """In the loop over K too."""
    p = integers("multi_lora_shared", tokens=15, k=300)
    plain = p.fused(backend, tile)
    for which in ("lora_as", "lora_bs", "ys", "dys"):
        first, second = getattr(p, which)
        strided = replace(p, **{which: (first, reversed_dimensions(second))})
        assert_same(plain, strided.fused(backend, tile))


@each_backend
@pytest.mark.parametrize("which", ["x", "ys", "dys"])
@pytest.mark.parametrize("dim", [0, 1])
def test_expanded_operands(backend, which, dim):
    problem = integers(tokens=15, k=18)

    def change(t):
        return t.narrow(dim, 0, 1).expand_as(t)

    moved = change(problem.x) if which == "x" else tuple(map(change, getattr(problem, which)))
    problem = replace(problem, **{which: moved})
    assert_same(problem.exact(), problem.fused(backend))


BIG = """
import torch
from fastpeft.ops import multi_lora, multi_lora_
from fastpeft.testing import integer_inputs

def apart(t, dim):  # t with one dimension so far apart that the last offset needs 33 bits; few pages are touched
    stride, strides = 2**30 if t.shape[dim] <= 4 else 2**25, list(t.contiguous().stride())
    strides[dim] = stride
    strides = [s if d == dim or d > dim else max(s, 1) for d, s in enumerate(strides)]
    buffer = torch.empty(stride * (t.shape[dim] - 1) + 4096, dtype=t.dtype, device=DEVICE)
    return torch.as_strided(buffer, t.shape, strides).copy_(t)

slots = torch.tensor([3, -1, 0, 3], dtype=torch.int32, device=DEVICE)
scales = torch.tensor([0.5, 1.0, 1.0, -1.0], device=DEVICE)

def run(x, lora_a, lora_b, y, dy):
    leaves = [t.detach().requires_grad_() for t in (x, lora_a, lora_b, y)]
    out = multi_lora(*leaves[:3], slots, scales, None, leaves[3], BACKEND,
                     dropouts=[0.5] * 4, seeds=torch.arange(4, device=DEVICE))
    found = [out, *torch.autograd.grad(out, leaves, dy)]
    plain = multi_lora(x, lora_a, lora_b, slots, scales, None, y, BACKEND)
    assert torch.equal(multi_lora_(y, x, lora_a, lora_b, slots, scales, None, BACKEND), plain)
    return found

for k in (4, 130):
    shapes = {"x": (4, k), "lora_a": (4, 4, k), "lora_b": (4, 4, 4), "y": (4, 4), "dy": (4, 4)}
    plain = dict(zip(shapes, integer_inputs(*shapes.values(), dtype=torch.float16, device=DEVICE)))
    wanted = run(**{name: t.clone() for name, t in plain.items()})
    for name, shape in shapes.items():
        for dim in range(len(shape)):
            operands = {other: t.clone() for other, t in plain.items()}
            found = run(**operands | {name: apart(plain[name], dim)})
            assert all(map(torch.equal, wanted, found)), (k, name, dim)
"""


@each_backend
def test_offsets_are_64_bit(backend):
    """Past 2**31 in every dimension of every operand, as 90,000 tokens of 24,576 columns are. In a process of its own:
    where an offset is cut to 32 bits, wrong elements are read, or the process dies."""
    settings = f"DEVICE, BACKEND = {DEVICE.type!r}, {backend!r}\n"
    done = subprocess.run([sys.executable, "-c", settings + BIG], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@form
@each_tile
@pytest.mark.parametrize(("backend", "dtype", "adapter"), served((FP32, FP32), (FP16, FP32)))
def test_the_same_bits_every_time(form, tile, backend, dtype, adapter):
    problem = MultiLoraProblem.make(70, 130, *FORMS[form], 3, dtype, adapter, DEVICE, 0.1)
    first = problem.fused(backend, tile)
    for _ in range(2 if DEVICE.type == "cpu" else 99):
        assert_same(first, problem.fused(backend, tile))


@each_backend
def test_a_second_backward_finds_everything_unchanged(backend):
    p = integers(tokens=21, k=18)
    leaves = [t.clone().requires_grad_() for t in (p.x, p.lora_as[0], p.lora_bs[0], p.ys[0])]
    x, a, b, y = leaves
    out = multi_lora(x, a, b, p.token_slots, p.scales, p.ranks, y, backend, dropouts=p.dropouts, seeds=p.seeds)
    first = torch.autograd.grad(out, leaves, p.dys[0], retain_graph=True)
    second = torch.autograd.grad(out, leaves, p.dys[0])
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize(("backend", "dtype", "adapter"), served((FP32, FP32), (FP16, FP16), (FP16, FP32)))
def test_only_x_and_s_are_kept_for_backward(backend, dtype, adapter):
    """Not the mask, not a gathered or widened x, not A and B of the tokens. In a large tile S is one plane."""
    p = MultiLoraProblem.make(33, 64, (48,), (8,), 3, dtype, adapter, DEVICE, dropout=0.5)
    x, a, b = (t.requires_grad_() for t in (p.x, p.lora_as[0], p.lora_bs[0]))
    routing, kept = route(p.token_slots, 3, 64, backend), {}

    def pack(t):
        if t.is_floating_point() and t.untyped_storage().data_ptr() not in {a.data_ptr(), b.data_ptr()}:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        multi_lora(x, a, b, routing, p.scales, p.ranks, None, backend, dropouts=p.dropouts, seeds=p.seeds)
    assert sum(kept.values()) == 33 * 64 * dtype.itemsize + 33 * 8 * 4 + p.scales.nbytes
