"""lora_mlp over quantised weights in PyTorch's machinery: checkpoints, opcheck, torch.compile, autocast, bad calls."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fastpeft
from fastpeft import ops
from tests.support.backends import BACKENDS, BF16, DEVICE, FP32
from tests.support.quantised import four_bit
from tests.support.quantised_mlps import OUT, K, bases, problem, written

each_backend = pytest.mark.parametrize("backend", BACKENDS)


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
        assert torch.equal(results[0][0], result[0])
        torch.testing.assert_close(result, results[0])  # S of down is a sum over parts where it is computed again


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
    lists = tensors, tables, list(p.lora_as), list(p.lora_bs), list(p.biases)
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
