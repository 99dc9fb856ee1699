"""experts' memory: what it reads, writes and keeps; any strides; 64-bit offsets; the same bits every time."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from fastpeft.ops import experts
from fastpeft.ops.routing import TILES
from fastpeft.reference import experts_grouped
from fastpeft.testing import ExpertsProblem, guarded, poisoned
from tests.support.backends import BACKENDS, DEVICE, FP16, FP32, served

each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_tile = pytest.mark.parametrize("tile", TILES)


def integers(**settings):
    settings = {"tokens": 17, "hidden": 36, "inner": 20, "dropout": 0.5, "device": DEVICE, **settings}
    return ExpertsProblem.make(**settings, integers=True)


def assert_same(one, other):
    for name, value in one.items():
        assert torch.equal(value.double(), other[name].double()), name


@each_tile
@each_backend
def test_nothing_is_read_or_written_outside(tile, backend):
    """Operands lie in buffers of NaN; what the op allocates is NaN until written, between guards."""
    problem, checks = integers(), []

    def guard(tensor):
        view, check = guarded(tensor, width=4)
        checks.append(check)
        return view

    inside = problem.map(guard)
    with poisoned():
        found = inside.fused(backend, tile)
    for check in checks:
        check()
    assert_same(problem.exact(), found)
    for before, after in zip(problem.leaves().values(), inside.leaves().values(), strict=True):
        assert torch.equal(before, after)  # nor the operands written


def sliced(t):
    big = torch.full([2 * n + 3 for n in t.shape], torch.nan, device=t.device, dtype=t.dtype)
    return big[tuple(slice(1, 1 + 2 * n, 2) for n in t.shape)].copy_(t)


def reversed_dimensions(t):
    order = list(range(t.dim()))[::-1]
    return t.permute(order).contiguous().permute(order)


def experts_last(t):
    """LoRA's B as PEFT stores it."""
    return t.movedim(0, -1).contiguous().movedim(-1, 0)


@each_backend
@pytest.mark.parametrize("change", [sliced, reversed_dimensions, experts_last], ids=lambda f: f.__name__)
def test_any_strides(backend, change):
    """Gradients have a layout of their parameter's: PEFT's B gets one that is a view of its own."""
    problem = integers(tokens=9, hidden=12, inner=6)
    moved = problem.map(change)
    assert_same(problem.fused(backend), moved.fused(backend))
    if change is experts_last:
        assert moved.fused(backend)["dup.lora_b"].movedim(0, -1).is_contiguous()


@pytest.mark.parametrize("served", [True, False])
def test_grouped_products_with_and_without_grouped_mm(served, monkeypatch):
    """Sizes that it takes, and the loop for PyTorch without it."""
    if served and experts_grouped._GROUPED_MM is None:
        pytest.skip("this PyTorch has no grouped_mm")
    if not served:
        monkeypatch.setattr(experts_grouped, "_GROUPED_MM", None)
    problem = integers(hidden=16, inner=8, ranks=(4, 8))
    assert_same(problem.exact(), problem.fused("reference"))


BIG = """
import torch
from fastpeft.ops import experts
from fastpeft.reference import ExpertLinear
from fastpeft.testing import integer_inputs

def apart(t, dim):  # t with one dimension so far apart that the last offset needs 33 bits; few pages are touched
    stride, strides = 2**30 if t.shape[dim] <= 4 else 2**29, list(t.contiguous().stride())
    strides[dim] = stride
    buffer = torch.empty(stride * (t.shape[dim] - 1) + 4096, dtype=t.dtype, device=DEVICE)
    return torch.as_strided(buffer, t.shape, strides).copy_(t)

index = torch.tensor([[3, 0], [4, 3], [0, 1], [3, 2]], device=DEVICE)

def run(x, w, wu, au, bu, wd, ad, bd, dy):
    leaves = [t.detach().requires_grad_() for t in (x, w, wu, au, bu, wd, ad, bd)]
    x, w, wu, au, bu, wd, ad, bd = leaves
    up, down = ExpertLinear(wu, None, au, bu, 0.5, 0.5), ExpertLinear(wd, None, ad, bd, -1.0, 0.5)
    y = experts(x, index, w, up, down, torch.relu, torch.arange(8, device=DEVICE).view(2, 4), BACKEND)
    return [y, *torch.autograd.grad(y, leaves, dy)]

E, H, I, R = 4, 4, 4, 2
shapes = {"x": (4, H), "w": (4, 2), "wu": (E, I, H), "au": (E, R, H), "bu": (E, I, R), "wd": (E, H, I),
          "ad": (E, R, I), "bd": (E, H, R), "dy": (4, H)}
plain = dict(zip(shapes, integer_inputs(*shapes.values(), dtype=torch.float16, device=DEVICE)))
wanted = run(**{name: t.clone() for name, t in plain.items()})
for name in ("x", "w", "au", "bu", "ad", "bd", "dy"):
    for dim in range(len(shapes[name])):
        found = run(**{other: t.clone() for other, t in plain.items()} | {name: apart(plain[name], dim)})
        assert all(map(torch.equal, wanted, found)), (name, dim)
"""


@each_backend
def test_offsets_are_64_bit(backend):
    """Past 2**31 in every dimension of what kernels of ours read. In a process of its own: where an offset is cut to
    32 bits, wrong elements are read, or the process dies."""
    settings = f"DEVICE, BACKEND = {DEVICE.type!r}, {backend!r}\n"
    done = subprocess.run([sys.executable, "-c", settings + BIG], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@each_tile
@pytest.mark.parametrize(("backend", "dtype", "adapter"), served((FP32, FP32), (FP16, FP32)))
def test_the_same_bits_every_time(tile, backend, dtype, adapter):
    problem = ExpertsProblem.make(dtype=dtype, adapter_dtype=adapter, device=DEVICE, dropout=0.1)
    first = problem.fused(backend, tile)
    for _ in range(2 if DEVICE.type == "cpu" else 99):
        assert_same(first, problem.fused(backend, tile))


@each_backend
def test_a_second_backward_finds_everything_unchanged(backend):
    p = integers()
    leaves = [t.clone().requires_grad_() for t in (p.x, p.top_k_weights, p.down.lora_b)]
    down = p.down._replace(lora_b=leaves[2])
    y = experts(leaves[0], p.top_k_index, leaves[1], p.up, down, p.activation, p.seeds, backend)
    first = torch.autograd.grad(y, leaves, p.dy, retain_graph=True)
    second = torch.autograd.grad(y, leaves, p.dy)
    assert all(map(torch.equal, first, second))


ALL = {"x", "top_k_weights", "up.lora_a", "up.lora_b", "down.lora_a", "down.lora_b"}


@pytest.mark.parametrize("trained", [ALL, {"up.lora_b"}], ids=["all", "B alone"])
@pytest.mark.parametrize(("backend", "dtype", "adapter"), served((FP32, FP32), (FP16, FP16), (FP16, FP32)))
def test_what_is_kept_for_backward(backend, dtype, adapter, trained):
    """x once, not its copies; u, not what the activation computes; S of both; the routing; never a mask."""
    p = ExpertsProblem.make(24, 64, 32, 4, 2, (8, 4), dtype, adapter, DEVICE, 0.5)
    kept, given = {}, {name: t.requires_grad_(name in trained) for name, t in p.leaves().items()}
    own = {t.data_ptr() for name, t in given.items() if name != "x"}

    def pack(t):
        if t.is_floating_point() and t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        experts(p.x, p.top_k_index, p.top_k_weights, p.up, p.down, p.activation, p.seeds, backend)
    rows = 24 * 2
    u, ranks = rows * 64 * dtype.itemsize, 8 + 4 if trained == ALL else 8
    assert sum(kept.values()) == u + rows * ranks * 4 + (24 * 64 * dtype.itemsize if trained == ALL else 0)


@each_backend
def test_sums_that_are_cut_along_k(backend):
    """More columns than one sum has, of x and of dy."""
    p = integers(tokens=5, hidden=260, inner=6)
    assert_same(p.exact(), p.fused(backend, 16))


@each_backend
def test_strided_adapters_cost_no_gradient_of_their_weights(backend):
    """A view of a frozen weight, as experts that are stored transposed hand it over, is read where it lies."""
    p = integers(dropout=0.0)
    transposed = replace(p, up=p.up._replace(weight=p.up.weight.mT.contiguous().mT))
    assert_same(p.fused(backend), transposed.fused(backend))
