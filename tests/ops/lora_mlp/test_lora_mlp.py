"""lora_mlp: the definition, no less accurate than PyTorch, exact gradients, chunks that change nothing."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import fastpeft
from fastpeft import _backend, reference
from fastpeft.ops import lora_mlp_chunks
from fastpeft.reference.lora_mlp import ACTIVATIONS, chunk_rows
from fastpeft.testing import MlpProblem, assert_no_worse, eager_lora_mlp
from tests.support.backends import BACKENDS, DEVICE, FP32, FP64, TRAINING, served
from tests.support.exactness import assert_same

each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
FUNCTIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda z: F.gelu(z, approximate="tanh")}


def in_chunks(backend, rows, monkeypatch):
    """The op computes so many rows at a time."""
    monkeypatch.setattr(_backend.load("lora_mlp", backend), "chunk_rows", lambda *_: rows)


@each_activation
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_definition_is_the_formula(activation, dropout):
    p = MlpProblem.make((2, 5, 7), 6, 4, (3, 2, 1), FP64, dropout=dropout, activation=activation)
    seeds = torch.tensor(p.seeds)

    def linear(x, i):
        keep = reference.keep_mask(seeds[i], dropout, 10, x.shape[-1]).view(x.shape)
        kept = 1 - round(dropout * 65536) / 65536
        low = torch.einsum("...k,rk,nr->...n", x * keep / kept, p.lora_as[i], p.lora_bs[i])
        return torch.einsum("...k,nk->...n", x, p.weights[i]) + p.biases[i] + p.scales[i] * low

    wanted = linear(FUNCTIONS[activation](linear(p.x, 0)) * linear(p.x, 1), 2)
    operands = p.x, p.weights, p.lora_as, p.lora_bs, p.biases, p.scales, p.dropouts
    torch.testing.assert_close(reference.lora_mlp(*operands, seeds, activation), wanted)
    torch.testing.assert_close(eager_lora_mlp(*operands, p.seeds, activation), wanted)


@each_activation
@pytest.mark.parametrize("chunk", [None, 50])
@pytest.mark.parametrize(("backend", "dtype", "adapter"), served(*TRAINING))
def test_no_less_accurate_than_pytorch(backend, dtype, adapter, activation, chunk, record_property, monkeypatch):
    if chunk is not None:
        in_chunks(backend, chunk, monkeypatch)
    shape = (2, 67, 96) if backend == "triton" and DEVICE.type == "cpu" else (2, 67, 224)
    problem = MlpProblem.make(shape, 160, 96, (16, 8, 12), dtype, adapter, DEVICE, 0.1, activation=activation)
    fused, eager, exact = problem.fused(backend), problem.eager(), problem.exact()
    ratios = {name: assert_no_worse(fused[name], eager[name], exact[name], name) for name in exact}
    worst = {kind: max(getattr(r, kind) for r in ratios.values()) for kind in ("max", "rms")}
    record_property("ratio", f"{worst['max']:.2f} max  {worst['rms']:.2f} rms")


@pytest.mark.parametrize(("backend", "dtype", "adapter"), served((FP32, FP32), (torch.bfloat16, FP32)))
def test_trained_weights_and_biases(backend, dtype, adapter):
    problem = MlpProblem.make((150, 96), 320, 224, (8, 4, 6), dtype, adapter, DEVICE, 0.1, trains_base=True)
    fused, eager, exact = problem.fused(backend), problem.eager(), problem.exact()
    for name in exact:
        assert_no_worse(fused[name], eager[name], exact[name], name)


@each_activation
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("backend", "dtype", "adapter"), served((FP64, FP64)))
def test_gradcheck(backend, dtype, adapter, dropout, activation, monkeypatch):
    in_chunks(backend, 4, monkeypatch)
    p = MlpProblem.make((2, 3, 7), 6, 5, (3, 2, 1), dtype, adapter, DEVICE, dropout)
    leaves = [t.clone().requires_grad_() for t in (p.x, *p.weights, *p.lora_as, *p.lora_bs, *p.biases)]

    def call(x, *flat):
        lists = [flat[i : i + 3] for i in range(0, 12, 3)]
        return fastpeft.ops.lora_mlp(x, *lists, p.scales, p.dropouts, p.seeds, activation, backend)

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
    frozen = [t if i in (0, *range(4, 10)) else t.detach() for i, t in enumerate(leaves)]  # then there are chunks
    assert torch.autograd.gradcheck(call, frozen, fast_mode=True)


@each_backend
@pytest.mark.parametrize("rows", [1, 3, 7, 16])
def test_chunks_draw_the_masks_of_the_whole(backend, rows, monkeypatch):
    """In float64, where the order of sums shows in the last places alone."""
    p = MlpProblem.make((16, 12), 10, 6, (3, 2, 4), FP64, device=DEVICE, dropout=0.5)
    in_chunks(backend, 16, monkeypatch)
    whole = p.fused(backend)
    in_chunks(backend, rows, monkeypatch)
    for name, value in p.fused(backend).items():
        torch.testing.assert_close(value, whole[name], rtol=1e-13, atol=1e-13, msg=name)


def test_chunks_cover_the_rows_once():
    for rows, size in ((0, 4), (1, 4), (4, 4), (5, 4), (9, 4), (8, 4), (3, 1)):
        pieces = [list(range(rows))[piece] for piece, _ in lora_mlp_chunks.chunks(rows, size, torch.empty(0))]
        assert [row for piece in pieces for row in piece] == list(range(rows))
        assert len(pieces) == max(1, -(-rows // size))
        assert all(len(piece) == size for piece in pieces[:-1])


def test_how_many_rows_a_chunk_has():
    """A quarter, so that what exists beside x, gate and up is half a tensor of theirs, and enough to fill a GPU."""
    kernels = pytest.importorskip("fastpeft.kernels.lora_mlp", reason="Triton is not installed")
    assert kernels.chunk_rows(2048, 4096) == 512  # 128 tiles of 128 x 128 in a product of 4096 columns
    assert kernels.chunk_rows(8192, 4096) == 2048
    assert kernels.chunk_rows(2048, 1024) == 2048
    assert kernels.chunk_rows(1, 8192) == 256
    for rows in (1, 100, 4096, 100_000):
        for columns in (1, 512, 4096, 16384):
            assert -(-rows // kernels.chunk_rows(rows, columns)) <= 4
            assert kernels.chunk_rows(rows, columns) * columns >= kernels.WAVE
            assert -(-rows // chunk_rows(rows, columns)) <= 4


@each_backend
@pytest.mark.parametrize("shape", [(0, 20), (1, 20), (130, 20), (20,), (2, 3, 20), (6, 0, 20)], ids=str)
def test_rows_and_leading_dimensions(backend, shape):
    p = MlpProblem.make(shape, 14, 9, (3, 1, 17), FP32, device=DEVICE, dropout=0.5)
    fused, exact = p.fused(backend), p.exact()
    assert fused["y"].shape == (*shape[:-1], 9)
    for name, value in exact.items():
        torch.testing.assert_close(fused[name].double(), value, rtol=1e-4, atol=1e-4, msg=name)


@each_backend
@pytest.mark.parametrize("asks", ["x", "lora_as", "lora_bs", "weights", "biases", "x lora_bs", "lora_as biases"])
def test_what_is_trained(backend, asks):
    """Any part of the operands asks for a gradient: it gets that of all, and nothing else gets any."""
    p = MlpProblem.make((21, 18), 14, 9, (3, 2, 4), FP64, device=DEVICE, dropout=0.5, trains_base=True)
    wanted = p.exact()
    names = ("weights", "lora_as", "lora_bs", "biases")
    x = p.x.clone().requires_grad_("x" in asks.split())
    groups = [[t.clone().requires_grad_(name in asks.split()) for t in getattr(p, name)] for name in names]
    y = fastpeft.ops.lora_mlp(x, *groups, p.scales, p.dropouts, p.seeds, p.activation, backend)
    y.backward(p.dy)
    leaves = {"dx": x} | {f"d{n}{i}": t for n, group in zip(names, groups, strict=True) for i, t in enumerate(group)}
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == leaf.requires_grad, name
        if leaf.requires_grad:
            torch.testing.assert_close(leaf.grad, wanted[name], msg=name)


@each_backend
def test_the_masks_are_those_of_three_layers(backend):
    """Seeds are drawn as gate, up and down draw theirs one after the other."""
    p = MlpProblem.make((21, 18), 14, 9, (3, 2, 4), FP64, device=DEVICE, dropout=0.5)
    columns = list(zip(p.weights, p.lora_as, p.lora_bs, p.biases, p.scales, p.dropouts, strict=True))
    torch.manual_seed(5)
    y = fastpeft.ops.lora_mlp(p.x, p.weights, p.lora_as, p.lora_bs, p.biases, p.scales, p.dropouts, backend=backend)
    torch.manual_seed(5)
    gate, up = (fastpeft.ops.lora_linear(p.x, *column, backend=backend) for column in columns[:2])
    wanted = fastpeft.ops.lora_linear(F.silu(gate) * up, *columns[2], backend=backend)
    torch.testing.assert_close(y, wanted)


@each_backend
def test_the_same_bits_every_time(backend):
    p = MlpProblem.make((131, 60), 48, 36, (12, 9, 5), FP32, device=DEVICE, dropout=0.1)
    first = p.fused(backend)
    for _ in range(2):
        assert_same(first, p.fused(backend))


@each_backend
def test_a_row_does_not_depend_on_the_other_rows(backend):
    """NaN and infinity in the other rows included."""
    p = MlpProblem.make((150, 48), 40, 36, (12, 9, 5), FP32, device=DEVICE, dropout=0.1)
    x, dy = p.x.clone(), p.dy.clone()
    x[:70], x[71:] = torch.nan, torch.inf
    dy[:70], dy[71:] = torch.inf, torch.nan
    one, other = p.fused(backend), replace(p, x=x, dy=dy).fused(backend)
    assert torch.equal(one["y"][70], other["y"][70])
    assert torch.equal(one["dx"][70], other["dx"][70])
