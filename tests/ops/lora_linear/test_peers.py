"""Bugs that other implementations shipped; each is a test here, named after it."""

import pytest
import torch

from fastpeft.ops import lora_linear, lora_linear_shared
from fastpeft.reference import keep_mask
from fastpeft.testing import LoraProblem
from tests.support.backends import BACKENDS, BF16, DEVICE, FP16, FP32, served

each_backend = pytest.mark.parametrize("backend", BACKENDS)
EYE = torch.eye(32, device=DEVICE)
ZERO = torch.zeros(32, 32, device=DEVICE)
ONES = torch.ones(16, 32, device=DEVICE)


def drawn(seed, dropout=0.5):
    return keep_mask(torch.tensor(seed, device=DEVICE), dropout, 16, 32, FP32) / (1 - dropout)


@each_backend
def test_dropout_on_the_base_path_instead_of_the_low_rank_one(backend):
    x = ONES.clone().requires_grad_()
    y = lora_linear(x, EYE, EYE, ZERO, None, 1.0, 0.5, 3, backend)
    assert torch.equal(y, x)
    y.sum().backward()
    assert torch.equal(x.grad, ONES)


@each_backend
def test_backward_crashes_at_dropout_0(backend):
    leaves = [t.clone().requires_grad_() for t in (ONES, EYE, EYE, EYE)]
    lora_linear(*leaves, dropout=0.0, backend=backend).sum().backward()
    assert torch.equal(leaves[0].grad, 2 * ONES)


@each_backend
def test_backward_ignores_the_mask_or_drops_the_division(backend):
    x, a = ONES.clone().requires_grad_(), EYE.clone().requires_grad_()
    lora_linear(x, ZERO, a, EYE, None, 1.0, 0.5, 3, backend).sum().backward()
    assert torch.equal(x.grad, drawn(3))
    assert torch.equal(a.grad, drawn(3).sum(0).expand(32, 32))


@each_backend
def test_one_mask_shared_by_q_k_and_v(backend):
    """Seeds drawn by the op differ between projections, in forward and backward."""
    x = ONES.clone().requires_grad_()
    ys = lora_linear_shared(x, [ZERO] * 3, [EYE] * 3, [EYE] * 3, dropouts=[0.5] * 3, backend=backend)
    masks = [*ys, *(torch.autograd.grad(y.sum(), x, retain_graph=True)[0] for y in ys)]
    for p, q in ((0, 1), (0, 2), (1, 2)):
        assert not torch.equal(masks[p], masks[q])
    for p in range(3):
        assert torch.equal(masks[p], masks[p + 3])


@each_backend
def test_dropout_of_one_projection_silently_skipped(backend):
    dropouts = [0.5, 0.0, 0.75]
    ys = lora_linear_shared(ONES, [ZERO] * 3, [EYE] * 3, [EYE] * 3, None, None, dropouts, [1, 2, 3], backend)
    for y, dropout, seed in zip(ys, dropouts, (1, 2, 3), strict=True):
        assert torch.equal(y, drawn(seed, dropout) if dropout else ONES)


@each_backend
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradient_written_into_a_saved_activation(backend, dropout):
    p = LoraProblem.make((9, 20), (12,), (4,), device=DEVICE)
    x = p.x.clone().requires_grad_()
    a, b = (t.clone().requires_grad_() for t in (p.lora_as[0], p.lora_bs[0]))
    dy = p.dys[0].clone()
    lora_linear(x, p.weights[0], a, b, None, 2.0, dropout, 3, backend).backward(dy)
    assert torch.equal(x, p.x)
    assert torch.equal(a, p.lora_as[0])
    assert torch.equal(b, p.lora_bs[0])
    assert torch.equal(dy, p.dys[0])


@each_backend
def test_non_contiguous_gradient_gives_wrong_values(backend):
    """Of a transpose, of every second column, and of a sum (stride 0)."""
    p = LoraProblem.make((9, 20), (12,), (4,), device=DEVICE, integers=True)
    leaves = [t.clone().requires_grad_() for t in (p.x, p.lora_as[0], p.lora_bs[0])]

    def gradients(dy):
        y = lora_linear(leaves[0], p.weights[0], *leaves[1:], None, 2.0, 0.5, 3, backend)
        return torch.autograd.grad(y, leaves, dy)

    every_second = torch.zeros(9, 24, device=DEVICE)[:, ::2].copy_(p.dys[0])
    for dy in (p.dys[0].T.contiguous().T, every_second, torch.ones((), device=DEVICE).expand(9, 12)):
        assert not dy.is_contiguous()
        for strided, plain in zip(gradients(dy), gradients(dy.contiguous()), strict=True):
            assert torch.equal(strided, plain)


@each_backend
def test_first_branch_served_for_all(backend):
    """Different A, B, scale, rank and mask in every projection; the last one counts as well."""
    p = LoraProblem.make((9, 20), (5, 6, 7), (1, 9, 4), device=DEVICE, dropout=0.5, integers=True)
    exact = p.exact()
    assert all(torch.equal(value.double(), exact[name]) for name, value in p.fused(backend).items())


@pytest.mark.parametrize(("backend", "dtype", "adapter"), served((FP16, FP32), (BF16, FP32)))
def test_low_rank_term_lost_by_rounding_it_to_16_bits_first(backend, dtype, adapter):
    """Terms below the last bit of the base each, above it together, when float32 adapters cancel: 1 - (1 - 2**-13)."""
    x = torch.ones(4, 32, device=DEVICE, dtype=dtype)
    a = torch.zeros(2, 32, device=DEVICE)
    a[0, 0], a[1, 0] = 1.0, -(1.0 - 2.0**-13)
    b = torch.ones(8, 2, device=DEVICE)
    y = lora_linear(x, torch.zeros(8, 32, device=DEVICE, dtype=dtype), a, b, backend=backend)
    assert (y == 2.0**-13).all()


@each_backend
def test_scale_negative_zero_and_large(backend):
    """Generators of peers' tests only ever scale by 1."""
    for scale in (-2.0, 0.0, 64.0, 1 / 3):
        y = lora_linear(ONES, EYE, EYE, EYE, None, scale, backend=backend)
        torch.testing.assert_close(y, ONES * (1 + scale))


@each_backend
@pytest.mark.parametrize("to", [BF16, FP16], ids=str)
def test_fp32_activation_into_a_16_bit_fused_op_under_autocast(backend, to):
    operands = [ONES, EYE.to(to), EYE, EYE]
    with torch.autocast(DEVICE.type, to):
        y = lora_linear(*operands, backend=backend)
    assert y.dtype == to
    assert torch.equal(y, 2 * ONES.to(to))
    with pytest.raises(TypeError, match=rf"^lora_linear: weight has dtype {to}, expected torch.float32"):
        lora_linear(*operands, backend=backend)  # without autocast: an error, never a silent cast
