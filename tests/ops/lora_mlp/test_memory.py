"""lora_mlp's memory: what it keeps and writes; any strides; a graph that is used twice; checkpoints."""

from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastpeft import _backend, ops
from fastpeft.testing import MlpProblem, guarded, poisoned
from tests.support.backends import BACKENDS, BF16, DEVICE, FP16, FP32, served
from tests.support.exactness import assert_same

each_backend = pytest.mark.parametrize("backend", BACKENDS)
GROUPS = ("weights", "lora_as", "lora_bs", "biases")


@pytest.fixture(autouse=True)
def _chunks(monkeypatch):
    for backend in BACKENDS:
        monkeypatch.setattr(_backend.load("lora_mlp", backend), "chunk_rows", lambda *_: 16)


def problem(dtype=FP32, adapter=None, dropout=0.5):
    return MlpProblem.make((37, 30), 22, 14, (5, 3, 9), dtype, adapter, DEVICE, dropout)


def every_tensor(p):
    return dict(enumerate([p.x, p.dy, *(t for name in GROUPS for t in getattr(p, name))]))


@each_backend
def test_nothing_is_read_or_written_outside(backend):
    """Operands lie in buffers of NaN; what the op allocates is NaN until written, between guards."""
    p, checks = problem(), []

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
def test_a_second_backward_finds_everything_unchanged(backend):
    p = problem()
    x, *leaves = [t.clone().requires_grad_() for t in (p.x, *p.lora_as, *p.lora_bs)]
    y = ops.lora_mlp(x, p.weights, leaves[:3], leaves[3:], None, p.scales, p.dropouts, p.seeds, backend=backend)
    first = torch.autograd.grad(y, [x, *leaves], p.dy, retain_graph=True)
    second = torch.autograd.grad(y, [x, *leaves], p.dy)
    assert_same(dict(enumerate(first)), dict(enumerate(second)))


def sliced(t):
    big = torch.full([2 * n + 3 for n in t.shape], torch.nan, device=t.device, dtype=t.dtype)
    return big[tuple(slice(1, 1 + 2 * n, 2) for n in t.shape)].copy_(t)


def transposed(t):
    return t.movedim(-1, 0).contiguous().movedim(0, -1)


@each_backend
@pytest.mark.parametrize("which", ["x", "dy", *GROUPS])
@pytest.mark.parametrize("change", [sliced, transposed], ids=lambda f: f.__name__)
def test_any_strides(backend, which, change):
    p = problem()
    given = getattr(p, which)
    moved = tuple(map(change, given)) if isinstance(given, tuple) else change(given)
    found = replace(p, **{which: moved}).fused(backend)
    for name, value in p.fused(backend).items():
        torch.testing.assert_close(found[name], value, msg=name)


@each_backend
@pytest.mark.parametrize("change", [sliced, transposed], ids=lambda f: f.__name__)
def test_any_strides_of_what_is_kept(backend, change):
    """A compiled graph may hand gate and up on as it likes."""
    impl = _backend.load("lora_mlp", backend)
    gate, up, dh = (torch.randn(37, 22, device=DEVICE) for _ in range(3))
    moved = [change(t) for t in (gate, up, dh)]
    torch.testing.assert_close(impl.forward(*moved[:2], "gelu"), impl.forward(gate, up, "gelu"))
    found, wanted = impl.backward_(moved[2], *moved[:2], "silu"), impl.backward_(dh, gate, up, "silu")
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(("backend", "dtype", "adapter"), served((FP32, FP32), (FP16, FP32), (BF16, FP32)))
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_only_x_gate_up_and_s_are_kept(backend, dtype, adapter, dropout):
    """Not the activation, not its product, no mask, no dropped or float32 copy. With every A frozen not even x."""
    p = problem(dtype, adapter, dropout)
    x, given = p.x.requires_grad_(), {t.data_ptr() for t in (*p.weights, *p.lora_as, *p.lora_bs)}

    def kept(lora_as, lora_bs):
        found = {}

        def pack(t):
            if t.data_ptr() not in given and t.dtype != torch.int64:
                found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = ops.lora_mlp(x, p.weights, lora_as, lora_bs, None, p.scales, p.dropouts, p.seeds, backend=backend)
        return sum(found.values()), y

    def trained(ts):
        return [t.requires_grad_() for t in ts]

    x_bytes, wide, s_bytes = 37 * 30 * dtype.itemsize, 2 * 37 * 22 * dtype.itemsize, 37 * 17 * adapter.itemsize
    frozen, _ = kept(p.lora_as, p.lora_bs)
    assert frozen == wide
    assert kept(trained(p.lora_as), p.lora_bs)[0] == wide + x_bytes
    found, y = kept(p.lora_as, trained(p.lora_bs))
    assert found == wide + x_bytes + s_bytes
    y.backward(p.dy)
    assert x.grad is not None


@each_backend
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_draw_the_same_masks(backend, reentrant):
    p = problem()
    results = []
    for way in (lambda f, *args: f(*args), lambda f, *args: checkpoint(f, *args, use_reentrant=reentrant)) * 3:
        torch.manual_seed(11)
        leaves = [t.clone().requires_grad_() for t in (p.x, *p.lora_as, *p.lora_bs)]

        def call(x, *lists):
            x = x.sin()
            return ops.lora_mlp(x, p.weights, lists[:3], lists[3:], None, p.scales, p.dropouts, backend=backend).cos()

        y = way(call, *leaves)
        results.append([y.detach(), *torch.autograd.grad(y.sum(), leaves)] if not reentrant else _backward(y, leaves))
    for result in results[1:]:
        assert torch.equal(results[0][0], result[0])
        torch.testing.assert_close(result, results[0])  # gate and up come in chunks where they are computed again


def _backward(y, leaves):
    y.sum().backward()
    return [y.detach(), *(t.grad for t in leaves)]
