"""lora_linear around a quantised weight: the bits of the dense call, and nothing of W kept."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from fastpeft import _backend, ops
from fastpeft.testing import LoraProblem
from tests.support.backends import BACKENDS, DEVICE, FP16, FP32, FP64, served
from tests.support.quantised import eight_bit, four_bit

each_backend = pytest.mark.parametrize("backend", BACKENDS)


def bases(dtype, k=70):
    """Of the three projections of ``problem``: 4 bits, nested, of blocks that cross rows; dense; 8 bits."""
    found = four_bit(33, k, 32, True, dtype), four_bit(9, k, 64, False, dtype), eight_bit(20, k, dtype)
    return [ops.Base(*(p.to(DEVICE) if isinstance(p, torch.Tensor) else p for p in base)) for base in found]


def problem(dtype=FP32, adapter=None, dropout=0.0, rows=(2, 19)):
    return LoraProblem.make((*rows, 70), (33, 9, 20), (4, 3, 5), dtype, adapter, DEVICE, dropout)


def computed(p, weights, backend, form="shared"):
    """Outputs, and the gradients of x, A, B and the biases."""
    x, *lists = p.x.clone().requires_grad_(), p.lora_as, p.lora_bs, p.biases
    lists = [[None if t is None else t.clone().requires_grad_() for t in ts] for ts in lists]
    if form == "shared":
        ys = ops.lora_linear_shared(x, weights, *lists, p.scales, p.dropouts, p.seeds, backend)
    else:
        each = zip(weights, *lists, p.scales, p.dropouts, p.seeds, strict=True)
        ys = [ops.lora_linear(x, *one, backend) for one in each]
    leaves = [x, *(t for ts in lists for t in ts if t is not None)]
    return [*ys, *torch.autograd.grad(ys, leaves, p.dys)]


@pytest.mark.parametrize(("backend", "dtype", "adapter"), served())
@pytest.mark.parametrize("form", ["one by one", "shared"])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_bits_are_those_of_the_dense_call(backend, dtype, adapter, form, dropout):
    p, quantised = problem(dtype, adapter, dropout), bases(dtype)
    dense = [ops.dequantise(base, backend=backend) for base in quantised]
    quantised[1] = dense[1]
    for _ in range(3):  # the second call is recorded, the third is run from what was
        for got, wanted in zip(computed(p, quantised, backend, form), computed(p, dense, backend, form), strict=True):
            assert torch.equal(got, wanted)


@each_backend
def test_gradients_are_exact(backend):
    p, (base, *_) = problem(FP64), bases(FP64)

    def call(x, a, b, bias):
        return ops.lora_linear(x, base, a, b, bias, 0.7, 0.25, 3, backend)

    leaves = [t.clone().requires_grad_() for t in (p.x, p.lora_as[0], p.lora_bs[0], p.biases[0])]
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


def test_gradients_of_gradients():
    """Of two projections, whose weights are not written into one buffer there."""
    p, quantised = problem(FP64, rows=(3,)), bases(FP64)
    leaves = [t.clone().requires_grad_() for t in (p.x, *p.lora_as[:2], *p.lora_bs[:2])]

    def call(x, a0, a1, b0, b1):
        return ops.lora_linear_shared(x, quantised[:2], [a0, a1], [b0, b1])

    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)
    plain = [ops.dequantise(base, FP64) for base in quantised[:2]]
    x = leaves[0]
    found = []
    for weights in (quantised[:2], plain):
        ys = ops.lora_linear_shared(x, weights, p.lora_as[:2], p.lora_bs[:2])
        (dx,) = torch.autograd.grad(sum((y * y).sum() for y in ys), x, create_graph=True)
        found += torch.autograd.grad(dx.sum(), x)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_only_x_and_s_are_kept(dropout):
    p, quantised = problem(dropout=dropout), bases(FP32)
    theirs = [t for base in quantised for t in base[:6]]
    given = {t.untyped_storage().data_ptr() for t in (p.x, *p.lora_as, *p.lora_bs, *theirs)}
    a = [t.clone().requires_grad_() for t in p.lora_as]
    b = [t.clone().requires_grad_() for t in p.lora_bs]
    given |= {t.untyped_storage().data_ptr() for t in (*a, *b)}
    for _ in range(3):
        kept = {}

        def pack(tensor, kept=kept):
            if tensor.untyped_storage().data_ptr() not in given:
                kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            ys = ops.lora_linear_shared(p.x, quantised, a, b, None, p.scales, p.dropouts)
        assert sum(kept.values()) <= 38 * 12 + 3, kept  # S, and seeds
        del ys


def test_a_trained_weight_beside_a_quantised_one():
    p, quantised = problem(), bases(FP32)
    weight = p.weights[1].clone().requires_grad_()
    ys = ops.lora_linear_shared(p.x, [quantised[0], weight], p.lora_as[:2], p.lora_bs[:2])
    torch.autograd.backward(ys, p.dys[:2])
    wanted = p.dys[1].reshape(-1, 9).T @ p.x.reshape(-1, 70)
    torch.testing.assert_close(weight.grad, wanted)


def test_compiled():
    p, quantised = problem(rows=(38,)), bases(FP32)
    leaves = [t.clone().requires_grad_() for t in (p.x, p.lora_as[0], p.lora_bs[0])]

    def function(x, a, b):
        return ops.lora_linear(x, quantised[0], a, b, None, 0.5, 0.25, 3).tanh().sum()

    wanted = torch.autograd.grad(function(*leaves), leaves)
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for one, other in zip(wanted, torch.autograd.grad(compiled(*leaves), leaves), strict=True):
        assert torch.equal(one, other)


def test_under_autocast():
    p, quantised = problem(FP32), bases(torch.bfloat16)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        y = ops.lora_linear(p.x, quantised[0], p.lora_as[0], p.lora_bs[0])
    wanted = ops.lora_linear(p.x.bfloat16(), ops.dequantise(quantised[0]), p.lora_as[0], p.lora_bs[0])
    assert torch.equal(y, wanted)


def test_a_cpu_keeps_one_buffer():
    """The next weight is written where the last was, after inference too; other threads have theirs."""
    p, (base, *_) = problem(rows=(3,)), bases(FP32)
    p, base = p.map(Tensor.cpu), ops.Base(*(t.cpu() if isinstance(t, Tensor) else t for t in base))
    found = []
    with pytest.MonkeyPatch.context() as patched:
        write = _backend.load("dequantise", "reference").write
        patched.setattr(
            _backend.load("dequantise", "reference"),
            "write",
            lambda out, *rest: (found.append(out.data_ptr()), write(out, *rest)),
        )
        with torch.inference_mode():
            ops.lora_linear(p.x, base, p.lora_as[0], p.lora_bs[0], backend="reference")
        x = p.x.clone().requires_grad_()
        ops.lora_linear(x, base, p.lora_as[0], p.lora_bs[0], backend="reference").sum().backward()
        with ThreadPoolExecutor(1) as pool:
            pool.submit(ops.lora_linear, p.x, base, p.lora_as[0], p.lora_bs[0], backend="reference").result()
    assert found[0] == found[1] == found[2] != found[3]


@pytest.mark.parametrize("extension", [True, False], ids=["with the extension", "without"])
def test_a_cpus_buffer_grows_and_serves_second_gradients(extension, monkeypatch):
    """Also where it was made in inference mode, by a smaller weight."""
    if not extension:
        monkeypatch.setattr(_backend.load("dequantise", "reference"), "scratch", lambda count, dtype: None)
    p, (small, *_) = problem(FP64, rows=(3,)), bases(FP64)
    p, small = p.map(Tensor.cpu), ops.Base(*(t.cpu() if isinstance(t, Tensor) else t for t in small))
    large = four_bit(1 << 12, 70, 32, dtype=FP64)
    x, weight = p.x.clone().requires_grad_(), ops.dequantise(large, FP64, backend="reference")
    b = torch.zeros(1 << 12, p.lora_as[0].shape[0], dtype=FP64)
    with torch.inference_mode():
        for base, lora_b in ((small, p.lora_bs[0]), (large, b)):
            y = ops.lora_linear(p.x, base, p.lora_as[0], lora_b, backend="reference")
    torch.testing.assert_close(y.clone(), p.x @ weight.T)
    y = ops.lora_linear(x, large, p.lora_as[0], b, backend="reference")
    (dx,) = torch.autograd.grad((y * y).sum(), x, create_graph=True)
    torch.testing.assert_close(torch.autograd.grad(dx.sum(), x)[0], 2 * (torch.ones_like(p.x) @ weight.T @ weight))


def test_bad_calls():
    p, (base, *_) = problem(), bases(FP32, k=64)
    with pytest.raises(ValueError, match="lora_linear: weight has K=64, expected K=70"):
        ops.lora_linear(p.x, base, p.lora_as[0], p.lora_bs[0])
    wide, (base, *_) = problem(FP16), bases(FP16)
    with pytest.raises(ValueError, match=r"lora_linear_shared: lora_bs\[0\] has N=9, expected N=33"):
        ops.lora_linear_shared(wide.x, [base], wide.lora_as[:1], [wide.lora_bs[1][:, :1].expand(9, 4)])


def test_explained():
    p, (base, *_) = problem(), bases(FP32)
    assert ops.explain("lora_linear", p.x, base, p.lora_as[0], p.lora_bs[0]).backend in ("triton", "reference")
    assert ops.explain("dequantise", base).backend in ("triton", "reference")
