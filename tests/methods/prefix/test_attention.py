"""Attention to a shared prefix, merged by log-sum-exp: against attention to rows that have their prefix in front."""

import pytest
import torch

from fastpeft.nn import prefix_attention_kernels as kernels
from fastpeft.nn.prefix_attention import prefix_attention
from fastpeft.testing import assert_no_worse
from tests.support.backends import BF16, DEVICE, FP16, FP32, FP64
from tests.support.prefix_attention import (
    ALL,
    APART,
    MASKS,
    SOME,
    B,
    D,
    H,
    T,
    exactly,
    in_front,
    operands,
    solve,
)


@pytest.fixture(params=["fused", "scores"])
def way(request, monkeypatch):
    """PyTorch's fused attention, and scores that are computed twice, which is what runs where none serves."""
    if request.param == "scores":
        monkeypatch.setattr(kernels, "KERNELS", kernels.KERNELS[-1:])
    return request.param


def copied(q, k, v, prefixes, mask, causal, scale):
    ((key, value, _),) = prefixes
    groups = q.shape[1] // k.shape[1]
    k, v = (
        torch.cat([t[None].expand(len(q), -1, -1, -1), own], 2).repeat_interleave(groups, 1)
        for t, own in ((key, k), (value, v))
    )
    if mask is not None:
        mask = torch.cat([mask.new_ones(*mask.shape[:3], key.shape[1]), mask], 3)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=scale)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("who", [ALL, SOME, APART])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_equals_a_prefix_in_front(way, heads, who, mask):
    args = operands(FP64, heads, T if mask == "causal" else 7, who, mask)
    grad = torch.randn(B, H, T, D, dtype=FP64, device=DEVICE)
    for found, wanted in zip(solve(prefix_attention, args, grad), solve(in_front, args, grad), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("who", [ALL, APART])
def test_dropout_near_0_is_none(who, mask):
    """Scores are written out for dropout; here so little of it that the difference cannot be seen."""
    args = operands(FP64, 2, T if mask == "causal" else 7, who, mask)
    grad = torch.randn(B, H, T, D, dtype=FP64, device=DEVICE)
    found = solve(lambda *given: prefix_attention(*given, dropout=1e-13), args, grad)
    for one, wanted in zip(found, solve(in_front, args, grad), strict=True):
        torch.testing.assert_close(one, wanted)


def test_dropout_drops_and_keeps_the_mean():
    args = operands(FP64)
    torch.manual_seed(0)
    drawn = torch.stack([prefix_attention(*args, dropout=0.5).detach() for _ in range(400)])
    assert not torch.equal(drawn[0], drawn[1])
    spread = drawn.std(0) / 400**0.5
    assert ((drawn.mean(0) - prefix_attention(*args)).abs() < 5 * spread).all()


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize("mask", ["none", "bool"])
def test_error_against_float64(way, dtype, mask, record_property):
    """Eager is PyTorch's attention to rows with a copy of the prefix each, as PEFT has them.

    test_prefix_attention_kernels.py has 16 bits on CUDA devices.
    """
    if dtype != FP32 and way == "fused" and DEVICE.type == "cuda":
        pytest.skip("next to fused attention to copies, the error of rounded parts is larger")
    args = operands(dtype, mask=mask, keys=48, T=48, D=64)
    grad = torch.randn_like(args[0])
    exact = exactly(args, grad)
    eager, found = solve(copied, args, grad), solve(prefix_attention, args, grad)
    for name, *three in zip(("out", "dq", "dk", "dv", "dprefix k", "dprefix v"), found, eager, exact, strict=True):
        ratios = assert_no_worse(*three, name)
        record_property("ratio", f"{ratios.max:5.2f} {ratios.rms:5.2f}  {name}")


def test_gradcheck(way):
    q, k, v, prefixes, mask, causal, scale = operands(FP64, mask="bool")
    flat = [t for prefix in prefixes for t in prefix[:2]]

    def function(q, k, v, *flat):
        pairs = [(flat[2 * i], flat[2 * i + 1], which) for i, (*_, which) in enumerate(prefixes)]
        return prefix_attention(q, k, v, pairs, mask, causal, scale)

    assert torch.autograd.gradcheck(function, (q, k, v, *flat), fast_mode=True)


def test_keeps_no_copy_of_the_prefix_and_no_scores(way):
    """Saved: the inputs, O and L; PEFT's way keeps keys and values with a copy of the prefix for every row."""
    args, kept = operands(FP32), {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = prefix_attention(*args)
    inputs = [*args[:3], *args[3][0][:2]]
    lse = 4 * B * H * T
    assert sum(kept.values()) == sum(t.untyped_storage().nbytes() for t in [*inputs, out]) + lse


def test_fewer_gradients_than_inputs(way):
    q, k, v, prefixes, *rest = operands(FP32)
    out = prefix_attention(q.detach(), k.detach(), v.detach(), prefixes, *rest)
    alone = torch.autograd.grad(out.sum(), prefixes[0][:2])
    out = prefix_attention(q, k, v, prefixes, *rest)
    for one, two in zip(alone, torch.autograd.grad(out.sum(), prefixes[0][:2]), strict=True):
        assert torch.equal(one, two)


def test_strides_and_a_gradient_that_is_expanded(way):
    args = operands(FP64)
    moved = [t.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for t in args[:3]]
    grad = torch.ones((), dtype=FP64, device=DEVICE).expand(B, H, T, D)
    found = solve(prefix_attention, (*moved, *args[3:]), grad)
    for one, wanted in zip(found, solve(in_front, args, grad.contiguous()), strict=True):
        torch.testing.assert_close(one, wanted)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("who", [ALL, APART])
def test_second_gradients(who, mask):
    """Gradients that are differentiated themselves are those of rows with their prefix in front."""
    args = operands(FP64, 2, T if mask == "causal" else 7, who, mask)
    leaves = [*args[:3], *(t for prefix in args[3] for t in prefix[:2])]

    def penalties(function):
        gradients = torch.autograd.grad(function(*args).square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in gradients), leaves)

    for found, wanted in zip(penalties(prefix_attention), penalties(in_front), strict=True):
        torch.testing.assert_close(found, wanted)
