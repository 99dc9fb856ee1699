"""dora_mlp: the definition, no less accurate than PyTorch, exact gradients, the masks and bits of layers."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import fastpeft
from fastpeft import ops, reference
from fastpeft.ops import dora_mlp_steps
from fastpeft.reference.lora_mlp import ACTIVATIONS
from fastpeft.testing import DoraMlpProblem, assert_no_worse, eager_dora_mlp
from tests.support.backends import BACKENDS, DEVICE, FP32, FP64, TRAINING, served
from tests.support.exactness import assert_same

each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_dropout = pytest.mark.parametrize("dropout", [0.0, 0.3])
FUNCTIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda z: F.gelu(z, approximate="tanh")}
NAMES = ("lora_as", "lora_bs", "magnitudes", "biases")


def operands(p, **changes):
    given = {name: getattr(p, name) for name in ("x", "weights", *NAMES, "scales", "dropouts", "seeds", "activation")}
    return given | changes


def some_lora(p, which):
    """The problem with LoRA in place of DoRA on these projections."""
    return replace(p, magnitudes=tuple(None if i in which else m for i, m in enumerate(p.magnitudes)))


@each_dropout
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_definition_is_the_formula(activation, dropout):
    p = some_lora(DoraMlpProblem.make((2, 5, 7), 6, 4, (3, 2, 1), FP64, None, "cpu", dropout, True, activation), [1])
    seeds = torch.tensor(p.seeds)

    def linear(x, i):
        keep = reference.keep_mask(seeds[i], dropout, 10, x.shape[-1]).view(x.shape)
        dropped = x * keep / (1 - round(dropout * 65536) / 65536)
        low = p.scales[i] * torch.einsum("nr,rk->nk", p.lora_bs[i], p.lora_as[i])
        if p.magnitudes[i] is None:
            return x @ p.weights[i].T + dropped @ low.T + p.biases[i]
        gain = p.magnitudes[i] / (p.weights[i] + low).square().sum(1).sqrt()
        whole = dropped @ (p.weights[i] + low).T
        return (x - dropped) @ p.weights[i].T + gain * whole + p.biases[i]

    wanted = linear(FUNCTIONS[activation](linear(p.x, 0)) * linear(p.x, 1), 2)
    torch.testing.assert_close(reference.dora_mlp(**operands(p, seeds=seeds)), wanted)
    torch.testing.assert_close(eager_dora_mlp(**operands(p)), wanted)


@pytest.mark.parametrize(
    ("dropout", "activation", "chunk"),
    [(0.0, "silu", 50), (0.1, "silu", None), (0.1, "gelu", 50), (0.0, "gelu_tanh", None)],
)
@pytest.mark.parametrize(("backend", "dtype", "adapter"), served(*TRAINING))
def test_no_less_accurate_than_pytorch(backend, dtype, adapter, dropout, activation, chunk, record_property, cut):
    cut(chunk)
    emulated = backend == "triton" and DEVICE.type == "cpu"
    shape, inner = ((2, 67, 96), 160) if emulated else ((2, 67, 224), 320)
    p = DoraMlpProblem.make(shape, inner, 96, (16, 8, 12), dtype, adapter, DEVICE, dropout, True, activation)
    fused, eager, exact = p.fused(backend), p.eager(), p.exact()
    ratios = {name: assert_no_worse(fused[name], eager[name], exact[name], name) for name in exact}
    worst = {kind: max(getattr(r, kind) for r in ratios.values()) for kind in ("max", "rms")}
    record_property("ratio", f"{worst['max']:.2f} max  {worst['rms']:.2f} rms")


@each_dropout
@pytest.mark.parametrize("lora", [(), (0,), (2,)], ids=str)
@pytest.mark.parametrize(("backend", "dtype", "adapter"), served((FP64, FP64)))
def test_gradcheck(backend, dtype, adapter, dropout, lora, cut):
    """With the norms given: they are constants to every gradient."""
    cut(4)
    p = some_lora(DoraMlpProblem.make((2, 3, 7), 6, 5, (3, 2, 1), dtype, adapter, DEVICE, dropout), lora)
    columns = zip(p.weights, p.lora_as, p.lora_bs, p.scales, strict=True)
    norms = [None if i in lora else ops.dora_norm(*column, backend) for i, column in enumerate(columns)]
    groups = [[t for t in getattr(p, name) if t is not None] for name in NAMES]
    leaves = [t.clone().requires_grad_() for t in (p.x, *(t for group in groups for t in group))]

    def call(x, *flat):
        given, rest = {}, iter(flat)
        for name in NAMES:
            given[name] = [None if t is None else next(rest) for t in getattr(p, name)]
        return ops.dora_mlp(**operands(p, x=x, norms=norms, backend=backend, **given))

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@each_backend
@each_dropout
@pytest.mark.parametrize("lora", [(), (0,), (1, 2), (0, 1, 2)], ids=str)
def test_some_projections_may_have_lora(backend, dropout, lora, cut):
    cut(8)
    p = some_lora(DoraMlpProblem.make((21, 18), 14, 9, (3, 2, 4), FP64, device=DEVICE, dropout=dropout), lora)
    exact = p.exact()
    for name, value in p.fused(backend).items():
        torch.testing.assert_close(value, exact[name], rtol=1e-11, atol=1e-11, msg=name)


@each_backend
@each_dropout
@pytest.mark.parametrize("rows", [1, 7])
def test_chunks_draw_the_masks_of_the_whole(backend, dropout, rows, cut):
    """In float64, where the order of sums shows in the last places alone."""
    p = DoraMlpProblem.make((16, 12), 10, 6, (3, 2, 4), FP64, device=DEVICE, dropout=dropout)
    whole = p.fused(backend)
    cut(rows)
    for name, value in p.fused(backend).items():
        torch.testing.assert_close(value, whole[name], rtol=1e-12, atol=1e-12, msg=name)


@each_backend
@each_dropout
@pytest.mark.parametrize("shape", [(0, 20), (1, 20), (130, 20), (20,), (2, 3, 20), (6, 0, 20)], ids=str)
def test_rows_and_leading_dimensions(backend, shape, dropout):
    p = DoraMlpProblem.make(shape, 14, 9, (3, 1, 17), FP32, device=DEVICE, dropout=dropout)
    fused, exact = p.fused(backend), p.exact()
    assert fused["y"].shape == (*shape[:-1], 9)
    for name, value in exact.items():
        torch.testing.assert_close(fused[name].double(), value, rtol=1e-4, atol=1e-4, msg=name)


@each_backend
@each_dropout
@pytest.mark.parametrize("asks", ["x", *NAMES, "x magnitudes", "lora_as biases", "lora_bs magnitudes"])
def test_what_is_trained(backend, asks, dropout, cut):
    """Any part of the operands asks for a gradient: it gets that of all, and nothing else gets any."""
    cut(8)
    p = DoraMlpProblem.make((21, 18), 14, 9, (3, 2, 4), FP64, device=DEVICE, dropout=dropout)
    wanted, flags = p.exact(), asks.split()
    x = p.x.clone().requires_grad_("x" in flags)
    groups = {name: [t.clone().requires_grad_(name in flags) for t in getattr(p, name)] for name in NAMES}
    ops.dora_mlp(**operands(p, x=x, backend=backend, **groups)).backward(p.dy)
    leaves = {"dx": x} | {f"d{name}{i}": t for name, group in groups.items() for i, t in enumerate(group)}
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == leaf.requires_grad, name
        if leaf.requires_grad:
            torch.testing.assert_close(leaf.grad, wanted[name], rtol=1e-11, atol=1e-11, msg=name)


@each_backend
@pytest.mark.parametrize("which", [0, 1, 2])
def test_one_magnitude_is_trained(backend, which, cut):
    """Its u alone is kept, and gate or up of the others."""
    cut(8)
    p = DoraMlpProblem.make((21, 18), 14, 9, (3, 2, 4), FP64, device=DEVICE, dropout=0.3)
    magnitudes = [m.clone().requires_grad_(i == which) for i, m in enumerate(p.magnitudes)]
    ops.dora_mlp(**operands(p, magnitudes=magnitudes, backend=backend)).backward(p.dy)
    assert [m.grad is not None for m in magnitudes] == [i == which for i in range(3)]
    torch.testing.assert_close(magnitudes[which].grad, p.exact()[f"dmagnitudes{which}"])


@each_backend
@each_dropout
def test_it_is_three_layers(backend, dropout):
    """Seeds are drawn as gate, up and down draw theirs one after the other."""
    p = DoraMlpProblem.make((21, 18), 14, 9, (3, 2, 4), FP64, device=DEVICE, dropout=dropout)
    names = ("weights", "lora_as", "lora_bs", "magnitudes", "biases", "scales", "dropouts")
    columns = list(zip(*(getattr(p, name) for name in names), strict=True))
    torch.manual_seed(5)
    y = ops.dora_mlp(**operands(p, seeds=None, backend=backend))
    torch.manual_seed(5)
    gate, up = (ops.dora_linear(p.x, *column, backend=backend) for column in columns[:2])
    torch.testing.assert_close(y, ops.dora_linear(F.silu(gate) * up, *columns[2], backend=backend))


@each_backend
def test_norms_that_are_given_are_taken(backend):
    p = DoraMlpProblem.make((5, 12), 10, 6, (3, 2, 4), FP32, device=DEVICE)
    norms = [torch.rand(n, device=DEVICE) + 0.5 for n in (10, 10, 6)]
    found = ops.dora_mlp(**operands(p, norms=norms, backend=backend))
    wanted = reference.dora_mlp(**operands(p, seeds=None, norms=norms))
    torch.testing.assert_close(found, wanted)


@each_backend
def test_the_norms_of_a_weight_are_made_once(backend, cut, monkeypatch):
    """However many chunks meet it."""
    cut(4)
    p, found, row_norms = DoraMlpProblem.make((21, 12), 10, 6, (3, 2, 4), device=DEVICE), [], dora_mlp_steps.row_norms
    monkeypatch.setattr(dora_mlp_steps, "row_norms", lambda *given: (found.append(given), row_norms(*given))[1])
    ops.dora_mlp(**operands(p, backend=backend))
    assert len(found) == 3


@each_backend
@each_dropout
def test_the_same_bits_every_time(backend, dropout):
    p = DoraMlpProblem.make((131, 60), 48, 36, (12, 9, 5), FP32, device=DEVICE, dropout=dropout)
    first = p.fused(backend)
    for _ in range(3):
        assert_same(first, p.fused(backend))


@each_backend
@each_dropout
def test_a_row_does_not_depend_on_the_other_rows(backend, dropout):
    """NaN and infinity in the other rows included."""
    p = DoraMlpProblem.make((150, 48), 40, 36, (12, 9, 5), FP32, device=DEVICE, dropout=dropout)
    x, dy = p.x.clone(), p.dy.clone()
    x[:70], x[71:] = torch.nan, torch.inf
    dy[:70], dy[71:] = torch.inf, torch.nan
    one, other = p.fused(backend), replace(p, x=x, dy=dy).fused(backend)
    assert torch.equal(one["y"][70], other["y"][70])
    assert torch.equal(one["dx"][70], other["dx"][70])


@each_backend
def test_what_is_written_past_the_version_counters_is_seen(backend):
    """Optimizers that write by address, or through .data, leave no trace."""
    p = DoraMlpProblem.make((5, 12), 10, 6, (3, 2, 4), FP32, device=DEVICE)
    for _ in range(4):
        for t in (*p.lora_as, *p.lora_bs):
            t.data.mul_(1.5)
        wanted = reference.dora_mlp(**operands(p, seeds=None))
        torch.testing.assert_close(ops.dora_mlp(**operands(p, backend=backend)), wanted, rtol=1e-4, atol=1e-4)


def test_explain():
    p = DoraMlpProblem.make((5, 12), 10, 6, (3, 2, 4), FP32, device=DEVICE)
    found = fastpeft.explain("dora_mlp", p.x, p.weights, p.lora_as, p.lora_bs, p.magnitudes)
    assert found.backend in BACKENDS
    assert "cuda" in found.reasons
