"""lora_mlp over quantised weights: the bits of the dense call, each weight written out once in a pass, nothing kept."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastpeft
from fastpeft import _backend, ops
from fastpeft.testing import MlpProblem, assert_no_worse, guarded, poisoned
from tests.support.backends import BACKENDS, BF16, DEVICE, FP32, FP64, TRAINING, served
from tests.support.exactness import assert_same
from tests.support.quantised import eight_bit, four_bit

each_backend = pytest.mark.parametrize("backend", BACKENDS)
SIZES = K, INNER, OUT = 32, 64, 48
KINDS = ["4 bits", "dense gate", "dense up", "8 bits"]


def bases(dtype, kind="4 bits", block=16, sizes=SIZES):
    """Gate in nested scales, up, and down; of one of the other kinds all are, or one is dense."""
    k, inner, out = sizes
    if kind == "8 bits":
        found = [eight_bit(inner, k, dtype), eight_bit(inner, k, dtype, 1), eight_bit(out, inner, dtype, 2)]
    else:
        found = [four_bit(inner, k, block, True, dtype), four_bit(inner, k, block, False, dtype, 1)]
        found.append(four_bit(out, inner, block, True, dtype, 2))
    found = [ops.Base(*(t.to(DEVICE) if isinstance(t, Tensor) else t for t in base)) for base in found]
    dense = {"dense gate": 0, "dense up": 1}.get(kind)
    return [ops.dequantise(base, dtype) if p == dense else base for p, base in enumerate(found)]


def written(weights, dtype):
    return tuple(ops.dequantise(w, dtype) if isinstance(w, ops.Base) else w for w in weights)


def problem(dtype=FP32, adapter=None, dropout=0.0, rows=(2, 19), sizes=SIZES):
    k, inner, out = sizes
    return MlpProblem.make((*rows, k), inner, out, (4, 3, 5), dtype, adapter, DEVICE, dropout)


def computed(p, weights, backend=None):
    """The output, and the gradients of x, A and B."""
    x, *lists = p.x.clone().requires_grad_(), p.lora_as, p.lora_bs
    lists = [[t.clone().requires_grad_() for t in ts] for ts in lists]
    y = ops.lora_mlp(x, weights, *lists, p.biases, p.scales, p.dropouts, p.seeds, p.activation, backend)
    leaves = {"dx": x} | {f"d{n}{i}": t for n, ts in zip("AB", lists, strict=True) for i, t in enumerate(ts)}
    return {"y": y.detach()} | dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), p.dy), strict=True))


@pytest.fixture
def cut(monkeypatch):
    """Has so many columns be computed at a time, and all rows."""

    def change(columns):
        for backend in BACKENDS:
            impl = _backend.load("lora_mlp", backend)
            monkeypatch.setattr(impl, "part_columns", lambda rows, size: columns or size)
            monkeypatch.setattr(impl, "chunk_rows", lambda rows, _: max(1, rows))

    change(None)
    return change


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


@each_backend
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_draw_the_same_masks(backend, reentrant, cut):
    cut(32)
    p, weights, results = problem(rows=(9,)), bases(FP32), []
    for way in (lambda f, *args: f(*args), lambda f, *args: checkpoint(f, *args, use_reentrant=reentrant)) * 2:
        torch.manual_seed(11)
        leaves = [t.clone().requires_grad_() for t in (p.x, *p.lora_as, *p.lora_bs)]

        def call(x, *lists):
            settings = {"dropouts": [0.5] * 3, "backend": backend}
            return ops.lora_mlp(x.sin(), weights, lists[:3], lists[3:], **settings).cos()

        y = way(call, *leaves)
        y.sum().backward()
        results.append([y.detach(), *(t.grad for t in leaves)])
    for result in results[1:]:
        assert all(map(torch.equal, results[0], result))


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


@each_backend
def test_opcheck(backend, cut):
    cut(32)
    p = problem(rows=(9,))
    tensors, tables, layouts = ops.base.parts(bases(FP32, "dense up"))
    a, b = ([t.clone().requires_grad_() for t in ts] for ts in (p.lora_as, p.lora_bs))
    settings = list(p.scales), [0.25] * 3, torch.tensor(p.seeds, device=DEVICE)
    args = p.x, tensors, tables, a, b, list(p.biases), *settings, layouts, "silu", backend
    torch.library.opcheck(torch.ops.fastpeft.lora_mlp.default, args)
    with torch.no_grad():
        _, kept = torch.ops.fastpeft.lora_mlp(*args)
    s, s_down, gate, up = kept
    lists = tensors, tables, list(p.lora_as), list(p.lora_bs)
    args = p.dy, p.x, s, s_down, gate, up, *lists, *settings, [True, False, True, True, False], layouts, "silu", backend
    torch.library.opcheck(torch.ops.fastpeft.lora_mlp_backward.default, args)


@each_backend
def test_compiled(backend, cut):
    p, weights = problem(rows=(38,)), bases(FP32)
    leaves = [t.clone().requires_grad_() for t in (p.x, *p.lora_as, *p.lora_bs)]

    def function(x, *flat):
        options = {"dropouts": [0.25] * 3, "seeds": [1, 2, 3], "backend": backend}
        return ops.lora_mlp(x, weights, flat[:3], flat[3:], **options).tanh().sum()

    torch._dynamo.reset()
    wanted = torch.autograd.grad(function(*leaves), leaves)
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for one, other in zip(wanted, torch.autograd.grad(compiled(*leaves), leaves), strict=True):
        assert torch.equal(one, other)


def test_under_autocast(cut):
    p, weights = problem(FP32), bases(BF16)
    with torch.autocast(DEVICE.type, BF16):
        y = ops.lora_mlp(p.x, weights, p.lora_as, p.lora_bs)
    assert torch.equal(y, ops.lora_mlp(p.x.bfloat16(), written(weights, BF16), p.lora_as, p.lora_bs))


def test_how_many_columns_a_part_has():
    """A quarter, and enough to fill a GPU."""
    kernels = pytest.importorskip("fastpeft.kernels.lora_mlp", reason="Triton is not installed")
    assert kernels.part_columns(2048, 14336) == 3584
    assert kernels.part_columns(2048, 4096) == 1024  # 128 tiles of 128 x 128 in a product of 2,048 rows
    assert kernels.part_columns(256, 14336) == 8192
    assert kernels.part_columns(0, 64) >= 64


def test_bad_calls():
    p, (gate, up, down) = problem(), bases(FP32)
    narrow = four_bit(OUT, K, 16)
    for weights, said in (
        ([gate, narrow, down], r"weights\[1\] has I=48, expected I=64"),
        ([gate, up, narrow], r"weights\[2\] has I=32, expected I=64"),
        ([down, up, down], r"weights\[0\] has K=64, expected K=32"),
    ):
        with pytest.raises(ValueError, match=f"lora_mlp: {said}"):
            ops.lora_mlp(p.x.cpu(), weights, [t.cpu() for t in p.lora_as], [t.cpu() for t in p.lora_bs])


def test_explained():
    p = problem()
    found = fastpeft.explain("lora_mlp", p.x, bases(FP32), p.lora_as, p.lora_bs)
    assert found.backend in BACKENDS
    kernels = pytest.importorskip("fastpeft.kernels.lora_mlp", reason="Triton is not installed")
    assert "columns at a time" in kernels.describe(p.x, p.lora_as, bases(FP32))[0]
