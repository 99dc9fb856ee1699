"""dora_linear: the definition, no less accurate than PyTorch, exact gradients, masks, a norm that is never formed."""

from dataclasses import replace

import pytest
import torch

import fastpeft
from fastpeft import ops, reference
from fastpeft.ops import dora_linear_norm
from fastpeft.testing import DoraProblem, assert_no_worse, eager_dora_linear
from tests.support.backends import BACKENDS, BF16, DEVICE, FP32, FP64, TRAINING, served
from tests.support.exactness import assert_same
from tests.support.quantised import eight_bit, four_bit

each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_dropout = pytest.mark.parametrize("dropout", [0.0, 0.3])


def operands(p):
    return p.x, p.weight, p.lora_a, p.lora_b, p.magnitude, p.bias, p.scale, p.dropout


@each_dropout
def test_the_definition_is_the_formula(dropout):
    p = DoraProblem.make((2, 5, 7), 6, 3, FP64, dropout=dropout)
    seed = torch.tensor([p.seed])
    keep = reference.keep_mask(seed, dropout, 10, 7).view(p.x.shape) / (1 - round(dropout * 65536) / 65536)
    merged = p.weight + p.scale * torch.einsum("nr,rk->nk", p.lora_b, p.lora_a)
    gain = p.magnitude / merged.square().sum(1).sqrt()
    whole = torch.einsum("...k,nk->...n", p.x * keep, merged)
    part = torch.einsum("...k,nk->...n", p.x - p.x * keep, p.weight)
    wanted = part + gain * whole + p.bias
    torch.testing.assert_close(reference.dora_linear(*operands(p), seed), wanted)
    torch.testing.assert_close(eager_dora_linear(*operands(p), p.seed), wanted)
    if not dropout:
        torch.testing.assert_close(wanted, p.x @ (gain[:, None] * merged).T + p.bias)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("backend", "dtype", "adapter"), served(*TRAINING))
def test_no_less_accurate_than_pytorch(backend, dtype, adapter, dropout, bias, record_property):
    shape = (2, 67, 192) if backend == "triton" and DEVICE.type == "cpu" else (2, 67, 512)
    problem = DoraProblem.make(shape, 160, 16, dtype, adapter, DEVICE, dropout, bias)
    fused, eager, exact = problem.fused(backend), problem.eager(), problem.exact()
    ratios = {name: assert_no_worse(fused[name], eager[name], exact[name], name) for name in exact}
    worst = {kind: max(getattr(r, kind) for r in ratios.values()) for kind in ("max", "rms")}
    record_property("ratio", f"{worst['max']:.2f} max  {worst['rms']:.2f} rms")


@each_dropout
@pytest.mark.parametrize(("backend", "dtype", "adapter"), served((FP64, FP64)))
def test_gradcheck(backend, dtype, adapter, dropout):
    """With the norm given: it is a constant to every gradient."""
    p = DoraProblem.make((2, 3, 7), 6, 3, dtype, adapter, DEVICE, dropout)
    norm = ops.dora_norm(p.weight, p.lora_a, p.lora_b, p.scale, backend)
    leaves = [t.clone().requires_grad_() for t in (p.x, p.lora_a, p.lora_b, p.magnitude, p.bias)]

    def call(x, a, b, magnitude, bias):
        return ops.dora_linear(x, p.weight, a, b, magnitude, bias, p.scale, dropout, p.seed, norm, backend)

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@each_dropout
@each_backend
def test_gradients_are_those_of_the_definition(backend, dropout):
    p = DoraProblem.make((19, 12), 10, 3, FP64, device=DEVICE, dropout=dropout)
    exact = p.exact()
    for name, value in p.fused(backend).items():
        torch.testing.assert_close(value, exact[name], rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize(("backend", "dtype", "adapter"), served())
@pytest.mark.parametrize("rank", [1, 8, 33])
def test_the_norm_is_that_of_the_sum(backend, dtype, adapter, rank):
    """No less accurate than the norm of the sum, in the dtype of sums."""
    p = DoraProblem.make((1, 96), 64, rank, dtype, adapter, DEVICE)
    sums = torch.promote_types(adapter, FP32)

    def by_hand(to):
        weight, a, b = (t.to(to) for t in (p.weight, p.lora_a, p.lora_b))
        return torch.linalg.norm(weight + p.scale * (b @ a), dim=1)

    found = ops.dora_norm(p.weight, p.lora_a, p.lora_b, p.scale, backend)
    assert found.dtype == sums
    torch.testing.assert_close(found.double(), by_hand(FP64), rtol=8 * torch.finfo(sums).eps, atol=0)


def test_a_row_that_cancels_has_no_norm():
    """Rounding leaves nothing below 0."""
    a, b = torch.randn(2, 40), torch.randn(30, 2)
    found = dora_linear_norm.row_norms(-(b @ a), a, b, 1.0, "reference")
    assert (found >= 0).all()
    assert (found < 1e-2).all()


@each_backend
def test_a_norm_that_is_given_is_taken(backend):
    p = DoraProblem.make((5, 12), 10, 3, FP32, device=DEVICE)
    norm = torch.rand(10, device=DEVICE) + 0.5
    found = ops.dora_linear(*operands(p), norm=norm, backend=backend)
    gain = p.magnitude / norm
    wanted = gain * (p.x @ (p.weight + p.scale * (p.lora_b @ p.lora_a)).T) + p.bias
    torch.testing.assert_close(found, wanted)


@each_backend
def test_what_is_written_past_the_version_counters_is_seen(backend):
    """Optimizers that write by address, or through .data, leave no trace."""
    p = DoraProblem.make((5, 12), 10, 3, FP32, device=DEVICE)
    before = ops.dora_linear(*operands(p), backend=backend)
    for _ in range(4):
        for t in (p.lora_a, p.lora_b, p.weight):
            t.data.mul_(1.5)
        wanted = reference.dora_linear(*operands(p))
        torch.testing.assert_close(ops.dora_linear(*operands(p), backend=backend), wanted)
    assert not torch.allclose(before, wanted)


@each_backend
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("shape", [(0, 20), (1, 20), (130, 20), (20,), (2, 3, 20), (6, 0, 20)], ids=str)
def test_rows_and_leading_dimensions(backend, shape, dropout):
    p = DoraProblem.make(shape, 9, 17, FP32, device=DEVICE, dropout=dropout)
    fused, exact = p.fused(backend), p.exact()
    assert fused["y"].shape == (*shape[:-1], 9)
    for name, value in exact.items():
        torch.testing.assert_close(fused[name].double(), value, rtol=1e-4, atol=1e-4, msg=name)


NAMES = ("x", "lora_a", "lora_b", "magnitude", "bias")


@each_backend
@each_dropout
@pytest.mark.parametrize("asks", [*NAMES, "x magnitude", "lora_a bias", "lora_b magnitude"])
def test_what_is_trained(backend, asks, dropout):
    """Any part of the operands asks for a gradient: it gets that of all, and nothing else gets any."""
    p = DoraProblem.make((21, 18), 14, 3, FP64, device=DEVICE, dropout=dropout)
    wanted = p.exact()
    leaves = {name: getattr(p, name).clone().requires_grad_(name in asks.split()) for name in NAMES}
    x, *rest = leaves.values()
    ops.dora_linear(x, p.weight, *rest, p.scale, dropout, p.seed, backend=backend).backward(p.dy)
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == leaf.requires_grad, name
        if leaf.requires_grad:
            torch.testing.assert_close(leaf.grad, wanted[f"d{name}"], msg=name)


@each_backend
@each_dropout
@pytest.mark.parametrize("make", [lambda: four_bit(20, 70, 64, True, BF16), lambda: eight_bit(20, 70, BF16)])
def test_a_quantised_weight_has_the_bits_of_the_dense_one(backend, dropout, make):
    base = ops.Base(*(t.to(DEVICE) if isinstance(t, torch.Tensor) else t for t in make()))
    p = DoraProblem.make((37, 70), 20, 4, FP32, device=DEVICE, dropout=dropout)
    dense = ops.dequantise(base, FP32)
    for _ in range(3):  # the second call is recorded, the third is run from what was
        assert_same(replace(p, weight=dense).fused(backend), replace(p, weight=base).fused(backend))
    norms = [ops.dora_norm(weight, p.lora_a, p.lora_b, p.scale, backend) for weight in (base, dense)]
    assert torch.equal(*norms)


@each_backend
def test_the_mask_is_that_of_lora(backend):
    """And is drawn from the same generator: with a gain of 1 for each row DoRA is LoRA."""
    p = DoraProblem.make((21, 18), 14, 3, FP64, device=DEVICE, dropout=0.5)
    norm = ops.dora_norm(p.weight, p.lora_a, p.lora_b, p.scale)
    torch.manual_seed(5)
    found = ops.dora_linear(*operands(replace(p, magnitude=norm)), backend=backend)
    torch.manual_seed(5)
    wanted = ops.lora_linear(p.x, p.weight, p.lora_a, p.lora_b, p.bias, p.scale, 0.5, backend=backend)
    torch.testing.assert_close(found, wanted)


@each_backend
@each_dropout
def test_the_same_bits_every_time(backend, dropout):
    p = DoraProblem.make((131, 60), 48, 12, FP32, device=DEVICE, dropout=dropout)
    first = p.fused(backend)
    for _ in range(2):
        assert_same(first, p.fused(backend))


@each_backend
@each_dropout
def test_a_row_does_not_depend_on_the_other_rows(backend, dropout):
    """NaN and infinity in the other rows included."""
    p = DoraProblem.make((150, 48), 36, 12, FP32, device=DEVICE, dropout=dropout)
    x, dy = p.x.clone(), p.dy.clone()
    x[:70], x[71:] = torch.nan, torch.inf
    dy[:70], dy[71:] = torch.inf, torch.nan
    one, other = p.fused(backend), replace(p, x=x, dy=dy).fused(backend)
    assert torch.equal(one["y"][70], other["y"][70])
    assert torch.equal(one["dx"][70], other["dx"][70])


@each_backend
def test_exact_on_integers(backend):
    """Rows that W has alone, of norms and gains that are powers of 2: nothing is rounded but the norm's root."""
    generator = torch.Generator().manual_seed(3)
    x, dy = (torch.randint(-1, 2, size, generator=generator).float().to(DEVICE) for size in ((40, 16), (40, 24)))
    weight = torch.randint(0, 2, (24, 16), generator=generator).mul(2).sub(1).float().to(DEVICE)  # of norm 4
    a = torch.randint(-1, 2, (2, 16), generator=generator).float().to(DEVICE)
    p = DoraProblem(x, weight, a, torch.zeros(24, 2, device=DEVICE), torch.full((24,), 8.0, device=DEVICE), None, dy)
    for dropout in (0.0, 0.5):
        assert_same(replace(p, dropout=dropout).exact(), replace(p, dropout=dropout).fused(backend))


def test_no_gradient_reaches_the_weight():
    p = DoraProblem.make((5, 12), 10, 3, FP32)
    weight = p.weight.clone().requires_grad_()
    with pytest.raises(ValueError, match="dora_linear: weight asks for a gradient, expected a frozen one"):
        ops.dora_linear(p.x, weight, p.lora_a, p.lora_b, p.magnitude)
    with torch.no_grad():
        ops.dora_linear(p.x, weight, p.lora_a, p.lora_b, p.magnitude)


def test_explain():
    p = DoraProblem.make((5, 12), 10, 3, FP32)
    found = fastpeft.explain("dora_linear", p.x, p.weight, p.lora_a, p.lora_b)
    assert found.backend in BACKENDS
    assert "cuda" in found.reasons
    kernels = pytest.importorskip("fastpeft.kernels.dora_linear", reason="Triton is not installed")
    assert "the products as lora_linear" in kernels.describe(p.x, [p.lora_a], [p.weight])
