"""dora_mlp over quantised weights: the numbers of the dense call, each weight written out once in a pass."""

from dataclasses import replace

import pytest
import torch

from fastpeft import _backend, ops
from fastpeft.testing import DoraMlpProblem, assert_no_worse
from tests.support.backends import BACKENDS, DEVICE, FP32, FP64, TRAINING, served
from tests.support.exactness import assert_same
from tests.support.quantised_mlps import INNER, KINDS, OUT, SIZES, bases, written

each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_dropout = pytest.mark.parametrize("dropout", [0.0, 0.25])


def problem(dtype=FP32, adapter=None, dropout=0.0, rows=(2, 19), sizes=SIZES):
    k, inner, out = sizes
    return DoraMlpProblem.make((*rows, k), inner, out, (4, 3, 5), dtype, adapter, DEVICE, dropout)


@pytest.mark.parametrize(("backend", "dtype", "adapter"), served())
@pytest.mark.parametrize("kind", KINDS)
@each_dropout
def test_bits_are_those_of_the_dense_call(backend, dtype, adapter, kind, dropout, cut):
    p, weights = problem(dtype, adapter, dropout), bases(dtype, kind)
    wanted = replace(p, weights=written(weights, dtype)).fused(backend)
    for _ in range(4):  # the second call is recorded, the third is run from what was
        assert_same(replace(p, weights=weights).fused(backend), wanted)


@each_backend
@each_dropout
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [16, 48])
def test_parts_are_the_whole(backend, kind, columns, dropout, cut):
    """Masks included; in float64, where the order of sums shows in the last places alone."""
    p = replace(problem(FP64, dropout=dropout), weights=bases(FP64, kind))
    whole = p.fused(backend)
    cut(7, columns)
    for name, value in p.fused(backend).items():
        torch.testing.assert_close(value, whole[name], rtol=1e-11, atol=1e-11, msg=name)


@pytest.mark.parametrize(("backend", "dtype", "adapter"), served(*TRAINING))
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_no_less_accurate_than_pytorch_in_parts(backend, dtype, adapter, dropout, cut):
    """PyTorch with the weights written out, which are the truth's too."""
    emulated = backend == "triton" and DEVICE.type == "cpu"
    sizes, columns = ((96, 160, 96), 64) if emulated else ((224, 320, 224), 96)
    cut(50, columns)
    p, weights = problem(dtype, adapter, dropout, (2, 67), sizes), bases(dtype, block=32, sizes=sizes)
    if emulated:  # too few columns for a rate of errors that are rare, in what no kernel computes
        p = replace(p, biases=(None,) * 3)
    dense = replace(p, weights=written(weights, dtype))
    ours, eager, exact = replace(p, weights=weights).fused(backend), dense.eager(), dense.exact()
    for name in exact:
        assert_no_worse(ours[name], eager[name], exact[name], name)


@each_backend
@each_dropout
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [None, 16])
def test_a_weight_is_written_out_once_in_a_pass(backend, kind, columns, dropout, cut, monkeypatch):
    """The norms of its rows included; in parts, none larger than asked for, all in one place."""
    cut(10, columns)
    p, weights = problem(rows=(150,), dropout=dropout), bases(FP32, kind)
    impl, found = _backend.load("dequantise", backend), []
    write = impl.write
    monkeypatch.setattr(impl, "write", lambda out, *rest: (found.append(out), write(out, *rest)))
    total = sum(w.shape[0] * w.shape[1] for w in weights if isinstance(w, ops.Base))
    x = p.x.clone().requires_grad_()
    y = ops.dora_mlp(x, weights, p.lora_as, p.lora_bs, p.magnitudes, dropouts=p.dropouts, backend=backend)
    for _ in range(2):
        assert sum(out.numel() for out in found) == total
        assert max(out.numel() for out in found) <= (columns or OUT) * INNER
        assert len({out.data_ptr() for out in found}) <= 2  # the first may be smaller than those after it
        found.clear()
        y.sum().backward(retain_graph=True)


@each_backend
def test_a_weight_of_another_library(backend, cut):
    cut(10, 32)
    p, dense = problem(), written(bases(FP32), FP32)
    others = tuple(ops.written_by(lambda w=w: w, w.shape, DEVICE) for w in dense)
    cut()
    assert_same(replace(p, weights=others).fused(backend), replace(p, weights=dense).fused(backend))


@each_backend
@each_dropout
def test_gradients_are_exact(backend, dropout, cut):
    cut(2, 32)
    p, weights = problem(FP64, dropout=dropout, rows=(3,)), bases(FP64)
    columns = zip(weights, p.lora_as, p.lora_bs, p.scales, strict=True)
    norms = [ops.dora_norm(*column, backend) for column in columns]
    leaves = [t.clone().requires_grad_() for t in (p.x, *p.lora_as, *p.lora_bs, *p.magnitudes, *p.biases)]

    def call(x, *flat):
        lists = [flat[i : i + 3] for i in range(0, 12, 3)]
        return ops.dora_mlp(x, weights, *lists, p.scales, p.dropouts, p.seeds, norms, "gelu", backend)

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
    if backend == "reference":
        assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


@each_backend
def test_opcheck(backend, cut):
    cut(4, 32)
    p = problem(rows=(9,))
    tensors, tables, layouts = ops.base.parts(bases(FP32, "dense up"))
    groups = p.lora_as, p.lora_bs, p.magnitudes, p.biases
    lists = [[t.clone().requires_grad_() for t in ts] for ts in groups]
    settings = list(p.scales), [0.25] * 3, torch.tensor(p.seeds, device=DEVICE)
    absent = [torch.empty(0, device=DEVICE) for _ in range(3)]
    args = p.x, tensors, tables, *lists, absent, *settings, layouts, [True] * 3, "silu", backend
    torch.library.opcheck(torch.ops.fastpeft.dora_mlp.default, args)
    with torch.no_grad():
        _, (s, s_down, *kept) = torch.ops.fastpeft.dora_mlp(*args)
    lists = tensors, tables, *map(list, groups)
    args = p.dy, p.x, s, s_down, kept, *lists, *settings, [True] * 5, layouts, "silu", backend
    torch.library.opcheck(torch.ops.fastpeft.dora_mlp_backward.default, args)
