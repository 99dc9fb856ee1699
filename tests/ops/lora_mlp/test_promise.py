"""lora_mlp where what it keeps would be thrown away: x alone is kept, and the numbers are the same."""

import contextlib

import pytest
import torch

from fastpeft import ops
from fastpeft.testing import MlpProblem, assert_no_worse, guarded, poisoned
from tests.support.backends import BACKENDS, BF16, DEVICE, FP32, FP64, TRAINING, served
from tests.support.exactness import assert_same
from tests.support.quantised_mlps import bases, problem, written

each_backend = pytest.mark.parametrize("backend", BACKENDS)
KINDS = ["dense", "4 bits", "dense gate", "8 bits"]
offloading = torch.autograd.graph.save_on_cpu


def make(kind, dtype=FP32, dropout=0.5, rows=(2, 19), sizes=(32, 64, 48)):
    p = problem(dtype, None, dropout, rows, sizes)
    return p, (p.weights if kind == "dense" else bases(dtype, kind, sizes=sizes))


def computed(p, weights, backend, way=contextlib.nullcontext):
    """The output and every gradient of an MLP whose weights are frozen, and its biases where the rows are not cut."""
    x, *lists = p.x.clone().requires_grad_(), p.lora_as, p.lora_bs
    if any(isinstance(w, ops.Base) for w in weights):
        lists.append(p.biases)
    lists = [[t.clone().requires_grad_() for t in ts] for ts in lists]
    with way():
        y = ops.lora_mlp(x, weights, *[*lists, p.biases][:3], p.scales, p.dropouts, p.seeds, p.activation, backend)
    leaves = {"dx": x} | {f"d{n}{i}": t for n, ts in zip("ABb", lists, strict=False) for i, t in enumerate(ts)}
    return {"y": y.detach()} | dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), p.dy), strict=True))


@each_backend
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_bits_of_what_is_computed_again(backend, kind, dropout, cut):
    """In one chunk or part: the products have the shapes that they had in forward."""
    p, weights = make(kind, dropout=dropout)
    wanted = computed(p, weights, backend)
    for _ in range(4):  # the second call is recorded, the third is run from what was, with its backward a call later
        found = computed(p, weights, backend, offloading)
        if backend == "reference" or kind == "dense":
            assert_same(found, wanted)
        else:  # dS and dB of down are one kernel where S is kept
            assert torch.equal(found["y"], wanted["y"])
            torch.testing.assert_close(found, wanted)


@each_backend
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [8, 16, 48])
def test_chunks_and_parts_are_the_whole(backend, kind, size, cut, monkeypatch):
    """Masks included; in float64, where the order of sums shows in the last places alone."""
    p, weights = make(kind, FP64, 0.5)
    whole = computed(p, weights, backend)
    cut(size, rows=size)
    for name, value in computed(p, weights, backend, offloading).items():
        torch.testing.assert_close(value, whole[name], rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize(("backend", "dtype", "adapter"), served(*TRAINING))
def test_no_less_accurate_than_pytorch(backend, dtype, adapter, cut):
    cut(50, rows=50)
    emulated = backend == "triton" and DEVICE.type == "cpu"
    p = MlpProblem.make((2, 67, 96 if emulated else 224), 160, 96, (16, 8, 12), dtype, adapter, DEVICE, 0.1)
    with offloading():
        fused = p.fused(backend)
    eager, exact = p.eager(), p.exact()
    for name in exact:
        assert_no_worse(fused[name], eager[name], exact[name], name)


@pytest.mark.parametrize(("backend", "dtype", "adapter"), served(*TRAINING))
def test_no_less_accurate_than_pytorch_in_parts(backend, dtype, adapter, cut):
    emulated = backend == "triton" and DEVICE.type == "cpu"
    sizes, columns = ((96, 160, 96), 64) if emulated else ((224, 320, 224), 96)
    cut(columns)
    p = problem(dtype, adapter, 0.1, (2, 67), sizes)
    weights = bases(dtype, block=32, sizes=sizes)
    dense = MlpProblem(**(vars(p) | {"weights": written(weights, dtype)}))
    ours, eager, exact = computed(p, weights, backend, offloading), dense.eager(), dense.exact()
    for name in exact:
        mine = name.replace("dlora_as", "dA").replace("dlora_bs", "dB").replace("dbiases", "db")
        assert_no_worse(ours[mine], eager[name], exact[name], name)


@each_backend
@pytest.mark.parametrize("rows", [None, 16])
def test_trained_weights_beside_it(backend, rows, cut):
    cut(None, rows=rows)
    p = MlpProblem.make((37, 30), 22, 14, (5, 3, 9), FP64, None, DEVICE, 0.5, trains_base=True)
    with offloading():
        found = p.fused(backend)
    for name, value in p.fused(backend).items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12, msg=name)


@each_backend
@pytest.mark.parametrize("kind", KINDS)
def test_only_x_is_kept(backend, kind, cut):
    """And parameters and seeds, whichever of them is trained; a plan keeps the same."""
    p, weights = make(kind)
    x = p.x.clone().requires_grad_()
    given = {t.untyped_storage().data_ptr() for ts in (p.lora_as, p.lora_bs, p.biases) for t in ts}
    parts = [t for w in weights for t in (w[:6] if isinstance(w, ops.Base) else [w])]
    given |= {t.untyped_storage().data_ptr() for t in parts}
    counts = set()
    for _ in range(4):
        kept = []

        def pack(t, kept=kept):
            kept.append(t)
            return t

        pack.__module__ = offloading.__module__
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = ops.lora_mlp(x, weights, p.lora_as, p.lora_bs, p.biases, p.scales, p.dropouts, backend=backend)
        own = [t for t in kept if t.numel() and t.untyped_storage().data_ptr() not in given]
        assert [t.untyped_storage().data_ptr() for t in own if t.is_floating_point()] == [x.data_ptr()]
        assert sum(t.numel() for t in own if not t.is_floating_point()) <= 3
        counts.add(len(kept))
        assert y.requires_grad
        assert len(counts) == 1


@each_backend
@pytest.mark.parametrize("kind", ["dense", "4 bits"])
def test_a_second_backward_finds_everything_unchanged(backend, kind, cut):
    """Operands lie in buffers of NaN; what the op allocates is NaN until written, between guards."""
    cut(16, rows=16)
    (p, weights), checks = make(kind), []
    wanted = computed(p, weights, backend, offloading)

    def guard(tensor):
        view, check = guarded(tensor)
        checks.append(check)
        return view

    inside = p.map(guard)
    weights = inside.weights if kind == "dense" else weights
    biases = inside.biases
    own = (*inside.lora_as, *inside.lora_bs, *(biases if kind != "dense" else ()))
    x, *leaves = [t.requires_grad_() for t in (inside.x, *own)]
    with poisoned(), offloading():
        y = ops.lora_mlp(x, weights, leaves[:3], leaves[3:6], biases, p.scales, p.dropouts, p.seeds, backend=backend)
        first = torch.autograd.grad(y, [x, *leaves], p.dy, retain_graph=True)
        second = torch.autograd.grad(y, [x, *leaves], p.dy)
    for check in checks:
        check()
    for (name, value), found in zip(wanted.items(), [y.detach(), *first], strict=True):
        torch.testing.assert_close(found, value, msg=name)  # at other addresses a CPU's products are cut otherwise
    assert_same(dict(enumerate(first)), dict(enumerate(second)))


@pytest.mark.parametrize("way", [contextlib.nullcontext, offloading], ids=["kept", "not kept"])
@pytest.mark.parametrize("kind", ["dense", "4 bits"])
def test_gradients_of_gradients(way, kind, cut):
    """From the definition, biases included, which decide the activation's slope."""
    p, weights = make(kind, FP64, 0.25, (3,))
    leaves = [t.clone().requires_grad_() for t in (p.x, *p.lora_as, *p.lora_bs, *p.biases)]

    def call(x, *flat):
        with way():
            return ops.lora_mlp(x, weights, flat[:3], flat[3:6], flat[6:], p.scales, p.dropouts, p.seeds)

    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)
    wanted = torch.autograd.grad(call(*leaves), leaves, p.dy)
    for one, other in zip(torch.autograd.grad(call(*leaves), leaves, p.dy, create_graph=True), wanted, strict=True):
        torch.testing.assert_close(one.detach(), other)


@each_backend
@pytest.mark.parametrize("shape", [(0, 20), (1, 20), (20,), (2, 3, 20), (6, 0, 20)], ids=str)
def test_rows_and_leading_dimensions(backend, shape):
    p = MlpProblem.make(shape, 14, 9, (3, 1, 17), FP32, device=DEVICE, dropout=0.5)
    for _ in range(3):
        with offloading():
            fused = p.fused(backend)
        assert_same(fused, p.fused(backend))


@pytest.mark.parametrize("asks", ["x", "lora_as", "lora_bs", "weights", "biases", "nothing"])
def test_what_is_trained(asks):
    p = MlpProblem.make((21, 18), 14, 9, (3, 2, 4), FP64, device=DEVICE, dropout=0.5, trains_base=True)
    wanted, names = p.exact(), ("weights", "lora_as", "lora_bs", "biases")
    x = p.x.clone().requires_grad_(asks == "x")
    groups = [[t.clone().requires_grad_(name == asks) for t in getattr(p, name)] for name in names]
    with offloading():
        y = ops.lora_mlp(x, *groups, p.scales, p.dropouts, p.seeds, p.activation)
    assert y.requires_grad == (asks != "nothing")
    if y.requires_grad:
        y.backward(p.dy)
    leaves = {"dx": x} | {f"d{n}{i}": t for n, group in zip(names, groups, strict=True) for i, t in enumerate(group)}
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == leaf.requires_grad, name
        if leaf.requires_grad:
            torch.testing.assert_close(leaf.grad, wanted[name], msg=name)


def test_the_output_may_be_changed_in_place():
    p = problem()
    a, b = ([t.clone().requires_grad_() for t in ts] for ts in (p.lora_as, p.lora_bs))
    found = []
    for way in (contextlib.nullcontext, offloading):
        for _ in range(3):
            with way():
                y = ops.lora_mlp(p.x, p.weights, a, b, p.biases, backend="reference")
            found.append(torch.autograd.grad(y.mul_(2).relu_().sum(), a))
    for one in found[1:]:
        assert all(map(torch.equal, found[0], one))


def test_autocast(cut):
    p, found = problem(FP32), []
    x, a, b = p.x.clone().requires_grad_(), *([t.clone().requires_grad_() for t in ts] for ts in (p.lora_as, p.lora_bs))
    for way in (contextlib.nullcontext, offloading):
        with torch.autocast(DEVICE.type, BF16), way():
            y = ops.lora_mlp(x, p.weights, a, b, p.biases)
        found.append([y, *torch.autograd.grad(y.sum(), [x, *a, *b])])
    assert found[0][0].dtype == BF16
    assert all(map(torch.equal, *found))
