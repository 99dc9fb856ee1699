"""dora_linear's memory: what it keeps and writes; any strides; a graph that is used twice; checkpoints."""

from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastpeft import _backend, ops
from fastpeft.testing import DoraProblem, guarded, poisoned
from tests.support.backends import BACKENDS, BF16, DEVICE, FP16, FP32, served
from tests.support.exactness import assert_same

each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_dropout = pytest.mark.parametrize("dropout", [0.0, 0.5])
NAMES = ("x", "weight", "lora_a", "lora_b", "magnitude", "bias", "dy")


def problem(dtype=FP32, adapter=None, dropout=0.5):
    return DoraProblem.make((37, 30), 22, 5, dtype, adapter, DEVICE, dropout)


def leaves_of(p):
    return [t.clone().requires_grad_() for t in (p.x, p.lora_a, p.lora_b, p.magnitude, p.bias)]


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
    assert_same(*({name: getattr(one, name) for name in NAMES} for one in (p, inside)))  # nor the operands written


@each_backend
@each_dropout
def test_a_second_backward_finds_everything_unchanged(backend, dropout):
    p = problem(dropout=dropout)
    x, *rest = leaves = leaves_of(p)
    y = ops.dora_linear(x, p.weight, *rest, p.scale, dropout, p.seed, backend=backend)
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
@pytest.mark.parametrize("which", NAMES)
@pytest.mark.parametrize("change", [sliced, transposed], ids=lambda f: f.__name__)
def test_any_strides(backend, which, change):
    for dropout in (0.0, 0.5):
        p = problem(dropout=dropout)
        found = replace(p, **{which: change(getattr(p, which))}).fused(backend)
        for name, value in p.fused(backend).items():
            torch.testing.assert_close(found[name], value, msg=name)


@each_backend
@pytest.mark.parametrize("change", [sliced, transposed], ids=lambda f: f.__name__)
def test_any_strides_of_what_lies_between(backend, change):
    """A compiled graph may hand u on as it likes."""
    impl, factor, seeds = _backend.load("dora_linear", backend), torch.rand(22, device=DEVICE), torch.tensor([7])
    a, b = (torch.randn(37, 22, device=DEVICE) for _ in range(2))
    one, other, seeds = change(a.clone()), change(b.clone()), seeds.to(DEVICE)
    torch.testing.assert_close(impl.gain_gradient(one, other, FP32), (a * b).sum(0))
    torch.testing.assert_close(impl.scaled(one, factor), a * factor)
    torch.testing.assert_close(impl.masked(one, 0.5, seeds), impl.masked(a, 0.5, seeds))
    s, c = torch.randn(37, 3, device=DEVICE), torch.randn(22, 3, device=DEVICE)
    wanted = a + factor * b + s @ c.T
    torch.testing.assert_close(impl.combined(change(s), change(c), None, other, factor, one), wanted)
    torch.testing.assert_close(impl.combined(s, c, change(factor), other, factor), wanted - a + factor)
    impl.add_masked_(one, other, 0.5, seeds)
    torch.testing.assert_close(one, a + impl.masked(b, 0.5, seeds))


@pytest.mark.parametrize(("backend", "dtype", "adapter"), served((FP32, FP32), (FP16, FP32), (BF16, FP32)))
@each_dropout
def test_only_x_s_and_u_are_kept(backend, dtype, adapter, dropout):
    """No mask, no dropped or float32 copy of x; u for the magnitude alone. With A frozen not even x."""
    p = problem(dtype, adapter, dropout)
    x, given = p.x.requires_grad_(), {t.data_ptr() for t in (p.weight, p.lora_a, p.lora_b, p.magnitude)}

    def kept(asks):
        found, rest = {}, [getattr(p, name).detach().requires_grad_(name in asks) for name in NAMES[2:5]]

        def pack(t):
            if t.data_ptr() not in given and t.dtype != torch.int64:
                found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            ops.dora_linear(x, p.weight, *rest, None, p.scale, dropout, p.seed, backend=backend)
        return sum(found.values())

    tables, x_bytes, s_bytes, u_bytes = 2 * 22 * 4, 37 * 30 * dtype.itemsize, 37 * 5 * 4, 37 * 22 * dtype.itemsize
    for _ in range(3):
        assert kept(()) == tables
        assert kept(("lora_a",)) == tables + x_bytes
        assert kept(("lora_b",)) == tables + s_bytes
        assert kept(("magnitude",)) == tables + s_bytes + u_bytes
        assert kept(("lora_a", "lora_b", "magnitude")) == tables + x_bytes + s_bytes + u_bytes


@each_backend
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_draw_the_same_masks(backend, reentrant):
    p = problem()
    results = []
    for way in (lambda f, *args: f(*args), lambda f, *args: checkpoint(f, *args, use_reentrant=reentrant)) * 3:
        torch.manual_seed(11)
        leaves = leaves_of(p)

        def call(x, *rest):
            return ops.dora_linear(x.sin(), p.weight, *rest, p.scale, p.dropout, backend=backend).cos()

        y = way(call, *leaves)
        y.sum().backward()
        results.append([y.detach(), *(t.grad for t in leaves)])
    for result in results[1:]:
        assert all(map(torch.equal, results[0], result))
