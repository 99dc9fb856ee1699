"""dora_mlp's memory: what it keeps and writes; any strides; a graph that is used twice; checkpoints."""

from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastpeft import _backend, ops
from fastpeft.testing import DoraMlpProblem, guarded, poisoned
from tests.support.backends import BACKENDS, BF16, DEVICE, FP16, FP32, FP64, served
from tests.support.exactness import assert_same

each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_dropout = pytest.mark.parametrize("dropout", [0.0, 0.5])
GROUPS = ("weights", "lora_as", "lora_bs", "magnitudes", "biases")


@pytest.fixture(autouse=True)
def _chunks(cut):
    cut(16)


def problem(dtype=FP32, adapter=None, dropout=0.5):
    return DoraMlpProblem.make((37, 30), 22, 14, (5, 3, 9), dtype, adapter, DEVICE, dropout)


def every_tensor(p):
    return dict(enumerate([p.x, p.dy, *(t for name in GROUPS for t in getattr(p, name))]))


def called(p, x, lists, **changes):
    given = {"scales": p.scales, "dropouts": p.dropouts, "seeds": p.seeds} | changes
    return ops.dora_mlp(x, p.weights, lists[:3], lists[3:6], lists[6:9], lists[9:] or None, **given)


def leaves_of(p):
    return [t.clone().requires_grad_() for t in (p.x, *p.lora_as, *p.lora_bs, *p.magnitudes, *p.biases)]


@each_backend
@each_dropout
def test_nothing_is_read_or_written_outside(backend, dropout):
    """Operands lie in buffers of NaN; what the op allocates is NaN until written, between guards."""
    p, checks = problem(dropout=dropout), []

    def guard(tensor):
        view, check = guarded(tensor)
        checks.append(check)
        return view

    wanted, inside = p.fused(backend), p.map(guard)
    with poisoned():
        found = inside.fused(backend)
    for check in checks:
        check()
    assert_same(wanted, found)
    assert_same(every_tensor(p), every_tensor(inside))  # nor the operands written


@each_backend
@each_dropout
def test_a_second_backward_finds_everything_unchanged(backend, dropout):
    p = problem(dropout=dropout)
    x, *lists = leaves = leaves_of(p)
    y = called(p, x, lists, backend=backend)
    first = torch.autograd.grad(y, leaves, p.dy, retain_graph=True)
    y.detach().zero_()  # whoever is given y may overwrite it
    second = torch.autograd.grad(y, leaves, p.dy)
    assert_same(dict(enumerate(first)), dict(enumerate(second)))


def sliced(t):
    big = torch.full([2 * n + 3 for n in t.shape], torch.nan, device=t.device, dtype=t.dtype)
    return big[tuple(slice(1, 1 + 2 * n, 2) for n in t.shape)].copy_(t)


def transposed(t):
    return t.movedim(-1, 0).contiguous().movedim(0, -1)


@each_backend
@pytest.mark.parametrize("which", ["x", "dy", *GROUPS])
@pytest.mark.parametrize(("change", "dropout"), [(sliced, 0.5), (transposed, 0.0)], ids=["sliced", "transposed"])
def test_any_strides(backend, which, change, dropout):
    p = problem(FP64, dropout=dropout)
    given = getattr(p, which)
    moved = tuple(map(change, given)) if isinstance(given, tuple) else change(given)
    found = replace(p, **{which: moved}).fused(backend)
    for name, value in p.fused(backend).items():
        torch.testing.assert_close(found[name], value, msg=name)


@each_backend
def test_the_mask_of_some_columns(backend):
    impl = _backend.load("dora_linear", backend)
    q, seeds = torch.randn(37, 22, device=DEVICE), torch.tensor([7], device=DEVICE)
    whole = impl.masked(q, 0.5, seeds)
    for first in (0, 6, 20):
        dx = q.clone()
        impl.add_masked_(dx[:, first:], q[:, first:], 0.5, seeds, first)
        assert torch.equal(dx[:, first:], (q + whole)[:, first:])
        assert torch.equal(dx[:, :first], q[:, :first])


@pytest.mark.parametrize(("backend", "dtype", "adapter"), served((FP32, FP32), (FP16, FP32), (BF16, FP32)))
@each_dropout
def test_only_x_u_and_s_are_kept(backend, dtype, adapter, dropout):
    """No activation, no product, no mask, no dropped or float32 copy; with dropout gate and up. What is not trained
    keeps less."""
    p = problem(dtype, adapter, dropout)
    x = p.x.requires_grad_()
    given = {t.data_ptr() for name in GROUPS for t in getattr(p, name)}

    def kept(*asks):
        found, lists = {}, [t.detach().requires_grad_(name in asks) for name in GROUPS[1:] for t in getattr(p, name)]

        def pack(t):
            if t.data_ptr() not in given and t.dtype != torch.int64:
                found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            called(p, x, lists, backend=backend)
        return sum(found.values())

    tables, x_bytes, wide = 2 * (22 + 22 + 14) * 4, 37 * 30 * dtype.itemsize, 2 * 37 * 22 * dtype.itemsize
    s_first, s_down = 37 * 8 * adapter.itemsize, 37 * 9 * adapter.itemsize
    for _ in range(3):
        assert kept() == tables + wide
        assert kept("lora_as") == tables + wide + x_bytes
        assert kept("lora_bs") == tables + wide + s_first + s_down
        whole = tables + wide * (2 if dropout else 1) + 37 * 14 * dtype.itemsize + s_first + s_down
        assert kept("magnitudes") == whole
        assert kept("lora_as", "lora_bs", "magnitudes", "biases") == whole + x_bytes


@each_backend
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_draw_the_same_masks(backend, reentrant):
    p, results = problem(), []
    for way in (lambda f, *args: f(*args), lambda f, *args: checkpoint(f, *args, use_reentrant=reentrant)) * 3:
        torch.manual_seed(11)
        leaves = leaves_of(p)
        y = way(lambda x, *lists: called(p, x.sin(), lists, seeds=None, backend=backend).cos(), *leaves)
        y.sum().backward()
        results.append([y.detach(), *(t.grad for t in leaves)])
    for result in results[1:]:
        assert all(map(torch.equal, results[0], result))
