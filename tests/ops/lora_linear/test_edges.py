"""lora_linear at its edges: sizes, ranks, dtypes, what is trained, autocast, checkpointing, drawn shapes."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

import fastpeft
from fastpeft.testing import LoraProblem, assert_no_worse
from tests.support.backends import BACKENDS, BF16, DEVICE, FP16, FP32, FP64, served
from tests.support.exactness import assert_exact

GROUPS = ("x", "weights", "lora_as", "lora_bs", "biases")
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def integers(shape, outs=(19,), ranks=(5,), dtype=FP32, dropout=0.5, **options):
    return LoraProblem.make(shape, outs, ranks, dtype, device=DEVICE, dropout=dropout, integers=True, **options)


@each_backend
@pytest.mark.parametrize("shape", [(0, 20), (1, 20), (127, 20), (4097, 20), (1, 1), (6, 0, 20)], ids=str)
def test_rows(backend, shape):
    assert_exact(integers(shape), backend)


@each_backend
@pytest.mark.parametrize("rank", [1, 4, 8, 12, 16, 17, 64, 256])
def test_ranks(backend, rank):
    assert_exact(integers((37, 30), ranks=(rank,)), backend)


@each_backend
@pytest.mark.parametrize("ranks", [(1, 16), (64, 1, 5), (100, 156)], ids=str)
def test_ranks_of_projections_that_share_x(backend, ranks):
    assert_exact(integers((37, 30), (7, 19, 4)[: len(ranks)], ranks), backend)


@each_backend
@pytest.mark.parametrize("shape", [(10,), (6, 10), (2, 3, 10), (2, 1, 3, 10)], ids=str)
def test_leading_dimensions(backend, shape):
    problem = integers(shape)
    assert problem.fused(backend)["y0"].shape == (*shape[:-1], 19)
    assert_exact(problem, backend)


@each_backend
@pytest.mark.parametrize("trained", [c for n in (1, 2) for c in itertools.combinations(GROUPS, n)], ids="+".join)
def test_what_is_trained(backend, trained):
    """Any part of the operands asks for a gradient: it gets the same one, and nothing else gets any."""
    problem = integers((21, 18), (7, 5), (3, 4))
    wanted = problem.exact()
    x, *groups = (problem.x, *(getattr(problem, name) for name in GROUPS[1:]))
    leaves = dict(zip(GROUPS, ((x.clone(),), *(tuple(t.clone() for t in group) for group in groups)), strict=True))
    for name in trained:
        for leaf in leaves[name]:
            leaf.requires_grad_()
    (x,), *lists = leaves.values()
    ys = fastpeft.ops.lora_linear_shared(x, *lists, problem.scales, problem.dropouts, problem.seeds, backend)
    torch.autograd.backward(ys, problem.dys)
    names = dict(zip(GROUPS, ("dx", "dweight", "dlora_a", "dlora_b", "dbias"), strict=True))
    for name, group in leaves.items():
        for p, leaf in enumerate(group):
            if name in trained:
                assert torch.equal(leaf.grad.double(), wanted[names[name] + ("" if name == "x" else str(p))])
            else:
                assert leaf.grad is None


@each_backend
def test_one_output_unused(backend):
    """The projection that the loss does not see gets zeros, the other its full gradient."""
    problem = integers((21, 18), (7, 5), (3, 4))
    x = problem.x.clone().requires_grad_()
    lora_as = [a.clone().requires_grad_() for a in problem.lora_as]
    rest = (problem.lora_bs, problem.biases, problem.scales, problem.dropouts, problem.seeds, backend)
    _, y = fastpeft.ops.lora_linear_shared(x, problem.weights, lora_as, *rest)
    y.backward(problem.dys[1])
    alone = LoraProblem(
        problem.x,
        *((group[1],) for group in (problem.weights, problem.lora_as, problem.lora_bs, problem.biases, problem.dys)),
        (problem.scales[1],), (problem.dropouts[1],), (problem.seeds[1],),
    )  # fmt: skip
    wanted = alone.exact()
    assert torch.equal(x.grad.double(), wanted["dx"])
    assert torch.equal(lora_as[1].grad.double(), wanted["dlora_a0"])
    assert lora_as[0].grad is None or not lora_as[0].grad.any()


@each_backend
def test_a_projection_without_weight_is_the_low_rank_term_alone(backend):
    p = integers((21, 18), (7, 7), (3, 4))
    args = (p.lora_as, p.lora_bs, (None, p.biases[1]), p.scales, p.dropouts, p.seeds, backend)
    base, extra = fastpeft.ops.lora_linear_shared(p.x, (p.weights[0], None), *args)
    full = p.exact()
    assert torch.equal(base.double(), full["y0"] - p.biases[0].double())
    assert torch.equal(extra.double(), full["y1"] - p.x.double() @ p.weights[1].double().T)


@pytest.mark.parametrize(("backend", "dtype", "adapter"), served((FP32, FP32), (BF16, FP32), (FP16, FP32)))
@pytest.mark.parametrize("to", [BF16, FP16], ids=str)
def test_autocast_is_the_same_as_casting_by_hand(backend, dtype, adapter, to):
    """x, weight and bias take autocast's dtype; float32 adapters stay float32."""
    p = LoraProblem.make((9, 20), (12,), (4,), dtype, adapter, DEVICE, 0.25)
    operands = [t.requires_grad_() for t in (p.x, p.weights[0], p.lora_as[0], p.lora_bs[0], p.biases[0])]
    with torch.autocast(DEVICE.type, dtype=to):
        y = fastpeft.ops.lora_linear(*operands, 0.5, 0.25, 3, backend)
    by_hand = [t.detach().to(to) for t in operands]
    by_hand[2:4] = [t.detach().float() for t in operands[2:4]]
    by_hand = [t.requires_grad_() for t in by_hand]
    z = fastpeft.ops.lora_linear(*by_hand, 0.5, 0.25, 3, backend)
    assert y.dtype == to
    assert torch.equal(y, z)
    dy = torch.randn_like(y)
    grads, wanted = torch.autograd.grad(y, operands, dy), torch.autograd.grad(z, by_hand, dy)
    for grad, want, operand in zip(grads, wanted, operands, strict=True):
        assert torch.equal(grad, want.to(operand.dtype))


@each_backend
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_draws_the_same_mask_again(backend, reentrant):
    p = LoraProblem.make((9, 20), (12,), (4,), FP64 if DEVICE.type == "cpu" else FP32, device=DEVICE)

    def train(run):
        torch.manual_seed(11)
        x, a = p.x.clone().requires_grad_(), p.lora_as[0].clone().requires_grad_()
        y = run(lambda x: fastpeft.ops.lora_linear(x, p.weights[0], a, p.lora_bs[0], None, 2.0, 0.5, None, backend), x)
        y.backward(p.dys[0])
        return y.detach(), x.grad, a.grad

    kept = train(lambda function, x: function(x))
    recomputed = train(lambda function, x: checkpoint(function, x, use_reentrant=reentrant))
    for one, other in zip(kept, recomputed, strict=True):
        assert torch.equal(one, other)
    # and the forward mask is the backward mask: the derivative along x reproduces the linear output
    y, dx, _ = kept
    assert torch.allclose((dx * p.x).sum(), (y * p.dys[0]).sum(), rtol=1e-4)


@pytest.mark.slow
@each_backend
@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data())
def test_drawn_shapes(backend, data):
    lead = data.draw(st.lists(st.integers(0, 9), max_size=2), "leading dimensions")
    k = data.draw(st.integers(1, 140), "K")
    count = data.draw(st.integers(1, 3), "projections")
    outs = tuple(data.draw(st.integers(1, 140)) for _ in range(count))
    ranks = tuple(data.draw(st.integers(1, 40)) for _ in range(count))
    dropout = data.draw(st.sampled_from([0.0, 0.5, 0.75]), "dropout")
    assert_exact(integers((*lead, k), outs, ranks, dropout=dropout), backend)


@pytest.mark.parametrize(("backend", "dtype", "adapter"), served((FP16, FP32), (BF16, FP32)))
def test_fp32_adapters_are_used_in_fp32(backend, dtype, adapter):
    """Gradients of float32 adapters are far better than 16 bits can hold."""
    p = LoraProblem.make((65, 96), (48,), (8,), dtype, adapter, DEVICE, 0.1)
    fused, exact = p.fused(backend), p.exact()
    for name in ("dlora_a0", "dlora_b0"):
        assert fused[name].dtype == FP32
        error = (fused[name] - exact[name]).square().mean().sqrt() / exact[name].square().mean().sqrt()
        assert error < 0.05 * torch.finfo(dtype).eps, name
        assert_no_worse(fused[name], p.eager()[name], exact[name], name)
