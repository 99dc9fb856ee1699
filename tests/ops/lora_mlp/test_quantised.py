"""lora_mlp over quantised weights: the bits of the dense call, each weight written out once in a pass, nothing kept."""

from dataclasses import replace

import pytest
import torch

from fastpeft import _backend, ops
from fastpeft.testing import assert_no_worse, guarded, poisoned
from tests.support.backends import BACKENDS, BF16, DEVICE, FP32, FP64, TRAINING, served
from tests.support.exactness import assert_same
from tests.support.quantised_mlps import INNER, KINDS, OUT, K, bases, computed, problem, written

each_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.mark.parametrize(("backend", "dtype", "adapter"), served())
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_bits_are_those_of_the_dense_call(backend, dtype, adapter, kind, dropout, cut):
    p, weights = problem(dtype, adapter, dropout), bases(dtype, kind)
    wanted = computed(p, written(weights, dtype), backend)
    for _ in range(3):  # the second call is recorded, the third is run from what was
        assert_same(computed(p, weights, backend), wanted)


@each_backend
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [16, 32, 48])
def test_parts_are_the_whole(backend, kind, columns, cut):
    """Masks included; in float64, where the order of sums shows in the last places alone."""
    p, weights = problem(FP64, dropout=0.5), bases(FP64, kind)
    whole = computed(p, weights, backend)
    cut(columns)
    for name, value in computed(p, weights, backend).items():
        torch.testing.assert_close(value, whole[name], rtol=1e-13, atol=1e-13, msg=name)


@pytest.mark.parametrize(("backend", "dtype", "adapter"), served(*TRAINING))
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_no_less_accurate_than_pytorch_in_parts(backend, dtype, adapter, dropout, cut):
    """PyTorch with the weights written out, which are the truth's too."""
    emulated = backend == "triton" and DEVICE.type == "cpu"
    sizes, columns = ((96, 160, 96), 64) if emulated else ((224, 320, 224), 96)
    cut(columns)
    p, weights = problem(dtype, adapter, dropout, (2, 67), sizes), bases(dtype, block=32, sizes=sizes)
    dense = replace(p, weights=written(weights, dtype))
    ours, eager, exact = computed(p, weights, backend), dense.eager(), dense.exact()
    for name in exact:
        mine = name.replace("dlora_as", "dA").replace("dlora_bs", "dB")
        assert_no_worse(ours[mine], eager[name], exact[name], name)


@each_backend
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_gradients_are_exact(backend, dropout, cut):
    cut(32)
    p, weights = problem(FP64, dropout=dropout, rows=(3,)), bases(FP64)
    leaves = [t.clone().requires_grad_() for t in (p.x, *p.lora_as, *p.lora_bs)]

    def call(x, *flat):
        settings = p.biases, p.scales, p.dropouts, p.seeds, "gelu", backend
        return ops.lora_mlp(x, weights, flat[:3], flat[3:], *settings)

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
    if backend == "reference":
        assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


@each_backend
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [None, 16])
def test_a_weight_is_written_out_once_in_a_pass(backend, kind, columns, cut, monkeypatch):
    """In parts, none larger than asked for, all in one place; the rows' number changes nothing."""
    cut(columns)
    p, weights = problem(rows=(150,)), bases(FP32, kind)
    impl, found = _backend.load("dequantise", backend), []
    write = impl.write
    monkeypatch.setattr(impl, "write", lambda out, *rest: (found.append(out), write(out, *rest)))
    total = sum(w.shape[0] * w.shape[1] for w in weights if isinstance(w, ops.Base))
    x = p.x.clone().requires_grad_()
    y = ops.lora_mlp(x, weights, p.lora_as, p.lora_bs, backend=backend)
    for _ in range(2):
        assert sum(out.numel() for out in found) == total
        assert max(out.numel() for out in found) <= (columns or OUT) * INNER
        assert len({out.data_ptr() for out in found}) <= 2  # the first may be smaller than those after it
        found.clear()
        y.sum().backward(retain_graph=True)


@each_backend
def test_a_weight_of_another_library_is_asked_for_once_in_a_pass(backend, cut):
    cut(32)
    p, weights, asked = problem(), bases(FP32), []
    dense = written(weights, FP32)

    def by(index):
        return lambda: (asked.append(index), dense[index])[1]

    others = [ops.written_by(by(i), w.shape, DEVICE) for i, w in enumerate(dense)]
    x = p.x.clone().requires_grad_()
    y = ops.lora_mlp(x, others, p.lora_as, p.lora_bs, backend=backend)
    assert asked == [0, 1, 2]
    y.sum().backward()
    assert asked == [0, 1, 2, 2, 0, 1]
    assert_same(computed(p, others, backend), computed(p, dense, backend))


@pytest.mark.parametrize(("backend", "dtype", "adapter"), served((FP32, FP32), (BF16, FP32)))
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_only_x_gate_up_and_s_are_kept(backend, dtype, adapter, dropout, cut):
    cut(32)
    p, weights = problem(dtype, adapter, dropout, (38,)), bases(dtype)
    a, b = ([t.clone().requires_grad_() for t in ts] for ts in (p.lora_as, p.lora_bs))
    given = {t.untyped_storage().data_ptr() for t in (*a, *b, *(t for w in weights for t in w[:6]))}
    for _ in range(3):
        kept = {}

        def pack(t, kept=kept):
            if t.untyped_storage().data_ptr() not in given and t.dtype != torch.int64:
                kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = ops.lora_mlp(p.x, weights, a, b, None, p.scales, p.dropouts, p.seeds, backend=backend)
        assert y.requires_grad
        assert sum(kept.values()) == 38 * ((K + 2 * INNER) * dtype.itemsize + 12 * adapter.itemsize)


@each_backend
def test_a_second_backward_finds_everything_unchanged(backend, cut):
    """Operands lie in buffers of NaN; what the op allocates is NaN until written, between guards."""
    cut(32)
    p, weights, checks = problem(dropout=0.5), bases(FP32), []
    wanted = computed(p, weights, backend)

    def guard(tensor):
        view, check = guarded(tensor)
        checks.append(check)
        return view

    inside = p.map(guard)
    x, *leaves = [t.requires_grad_() for t in (inside.x, *inside.lora_as, *inside.lora_bs)]
    settings = inside.biases, p.scales, p.dropouts, p.seeds
    with poisoned():
        y = ops.lora_mlp(x, weights, leaves[:3], leaves[3:], *settings, backend=backend)
        first = torch.autograd.grad(y, [x, *leaves], p.dy, retain_graph=True)
        second = torch.autograd.grad(y, [x, *leaves], p.dy)
    for check in checks:
        check()
    assert_same(dict(zip(wanted, [y.detach(), *first], strict=True)), wanted)
    assert_same(dict(enumerate(first)), dict(enumerate(second)))


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_trained_weight_beside_quantised_ones(which, cut):
    """And biases; in parts."""
    cut(32)
    p, weights = problem(FP64), bases(FP64)
    dense, found = written(weights, FP64), []
    for others in (weights, dense):
        trained = dense[which].clone().requires_grad_()
        given = [trained if i == which else w for i, w in enumerate(others)]
        biases = [t.clone().requires_grad_() for t in p.biases]
        y = ops.lora_mlp(p.x, given, p.lora_as, p.lora_bs, biases, backend="reference")
        found.append(torch.autograd.grad(y, [trained, *biases], p.dy))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
