"""Gradients of gradients: of every op, as the last layer and inside; an error where there are none."""

import pytest
import torch
from torch import Tensor, nn

import fastpeft
from fastpeft import ops
from tests.support.backends import DEVICE, FP64, served

each_backend = pytest.mark.parametrize("backend", [found.values[0] for found in served((FP64, FP64))])
SEED = torch.tensor([7])


def new(*shape: int, train: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + 17 * len(shape))
    return torch.randn(shape, generator=generator, dtype=FP64).to(DEVICE).requires_grad_(train)


def lora_linear(backend, dropout):
    def op(x, a, b, bias):
        return ops.lora_linear(x, w, a, b, bias, 0.7, dropout, SEED.to(DEVICE), backend=backend)

    w = new(4, 5, train=False)
    return op, (new(3, 5), new(2, 5), new(4, 2), new(4))


def lora_linear_shared(backend, dropout):
    def op(x, w, a, a2, b, b2):
        options = {"scales": [0.5, 2.0], "dropouts": [dropout, 0.0], "seeds": [7, 8], "backend": backend}
        return torch.cat(ops.lora_linear_shared(x, [w, None], [a, a2], [b, b2], **options), 1)

    return op, (new(3, 5), new(4, 5), new(2, 5), new(3, 5), new(4, 2), new(2, 3))


def lora_mlp(backend, dropout):
    w = [new(4, 5, train=False), new(4, 5, train=False).flip(0), new(3, 4, train=False)]

    def op(x, *parts):
        options = {"scales": [0.5, 2.0, 1.0], "dropouts": [dropout] * 3, "seeds": [7, 8, 9], "backend": backend}
        return ops.lora_mlp(x, w, parts[:3], parts[3:], **options)

    return op, (new(3, 5), new(2, 5), new(1, 5), new(2, 4), new(4, 2), new(4, 1), new(3, 2))


def dora_linear(backend, dropout):
    w, norm = new(4, 5, train=False), new(4, train=False).abs()

    def op(x, a, b, magnitude, bias):
        return ops.dora_linear(x, w, a, b, magnitude, bias, 0.7, dropout, SEED.to(DEVICE), norm, backend)

    return op, (new(3, 5), new(2, 5), new(4, 2), new(4), new(4).flip(0))


def dora_mlp(backend, dropout):
    """With LoRA on up."""
    w = [new(4, 5, train=False), new(4, 5, train=False).flip(0), new(3, 4, train=False)]
    norms = [new(4, train=False).abs(), None, new(3, train=False).abs()]

    def op(x, *parts):
        lists, (gate, down, bias) = (w, parts[:3], parts[3:6]), parts[6:]
        options = {"scales": [0.5, 2.0, 1.0], "dropouts": [dropout] * 3, "seeds": [7, 8, 9], "backend": backend}
        return ops.dora_mlp(x, *lists, [gate, None, down], [bias, None, None], norms=norms, **options)

    adapters = new(2, 5), new(1, 5), new(2, 4), new(4, 2), new(4, 1), new(3, 2)
    return op, (new(3, 5), *adapters, new(4), new(3), new(4).flip(0))


def multi_lora(backend, dropout):
    slots, scales, ranks = torch.tensor([1, -1, 0, 1]), torch.tensor([0.5, 2.0], dtype=FP64), torch.tensor([2, 1])
    slots, scales, ranks = slots.to(DEVICE), scales.to(DEVICE), ranks.to(DEVICE, torch.int32)
    drop = {"dropouts": [dropout, 0.0], "seeds": torch.tensor([3, 4], device=DEVICE)} if dropout else {}

    def op(x, a, b, y):
        return ops.multi_lora(x, a, b, slots, scales, ranks, y, backend, **drop)

    return op, (new(4, 5), new(2, 2, 5), new(2, 3, 2), new(4, 3))


def bottleneck(backend, dropout):
    def op(x, down, down_bias, up, up_bias, norm):
        options = {"norm_weight": norm, "dropout": dropout, "seed": SEED.to(DEVICE), "backend": backend}
        return ops.bottleneck(x, down, down_bias, up, up_bias, x, "gelu", 0.7, **options)

    return op, (new(3, 5), new(4, 5), new(4), new(5, 4), new(5), new(5))


def bottleneck_of_slots(backend, dropout):
    slots = torch.tensor([1, -1, 0], device=DEVICE)

    def op(x, down, up, scale, residual):
        options = {"scale": scale, "dropout": dropout, "seed": SEED.to(DEVICE), "slots": slots, "backend": backend}
        return ops.bottleneck(x, down, None, up, None, residual, "tanh", **options)

    return op, (new(3, 5), new(2, 4, 5), new(2, 6, 4), new(2, 6), new(3, 6))


def row_linear(backend, dropout):
    w, index = new(4, 5, train=False), torch.tensor([0, 2], device=DEVICE)

    def op(x, rows, bias):
        with torch.no_grad():
            live = w.index_copy(0, index, rows)
        return ops.row_linear(x, live, rows, index, bias, backend=backend)

    return op, (new(3, 5), new(2, 5), new(4))


# The places of inputs that cannot be trained alone, for want of what is then not kept.
REFUSED = {lora_linear: {2}, lora_linear_shared: {4, 5}, lora_mlp: {0, 4, 5, 6}, multi_lora: {2}, dora_linear: {2, 3}}
REFUSED[dora_mlp] = {0, *range(4, 10)}
REFUSED |= {(bottleneck, "reference"): {2, 3, 4}, (bottleneck_of_slots, "reference"): {0, 2, 3}}
OPS = [lora_linear, lora_linear_shared, lora_mlp, dora_linear, dora_mlp, multi_lora, bottleneck, bottleneck_of_slots]
OPS.append(row_linear)


@each_backend
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("make", OPS, ids=lambda make: make.__name__)
def test_second_gradients_in_float64(make, dropout, backend):
    op, inputs = make(backend, dropout)
    assert torch.autograd.gradgradcheck(op, inputs, fast_mode=True)


@each_backend
@pytest.mark.parametrize("make", OPS, ids=lambda make: make.__name__)
def test_each_input_alone(make, backend):
    """What is not trained is not kept: the second gradients are those among all, or an error says what is missing."""
    op, inputs = make(backend, 0.0)

    def penalty(values, i):
        (gradient,) = torch.autograd.grad(op(*values).square().sum(), values[i], create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), values[i])[0]

    for i in range(len(inputs)):
        alone = [t.detach().requires_grad_(j == i) for j, t in enumerate(inputs)]
        if i in REFUSED.get((make, backend), REFUSED.get(make, ())):
            with pytest.raises(RuntimeError, match="create_graph=True with a frozen"):
                penalty(alone, i)
        else:
            torch.testing.assert_close(penalty(alone, i), penalty(inputs, i))


@each_backend
@pytest.mark.parametrize(
    "make", [lora_linear, lora_linear_shared, multi_lora, row_linear], ids=lambda make: make.__name__
)
def test_a_hessian_as_the_last_layer(make, backend):
    op, (x, *rest) = make(backend, 0.0)
    rest = [t.detach().requires_grad_(make is row_linear) for t in rest]

    def loss(x):
        return op(x, *rest).square().sum()

    hessian = torch.autograd.functional.hessian(loss, x.detach())
    step = torch.randn_like(x)
    # The loss is a polynomial of the second degree in x.
    curvature = (step * torch.einsum("abcd,cd->ab", hessian, step)).sum()
    torch.testing.assert_close(loss(x + step) + loss(x - step) - 2 * loss(x), curvature)


def test_an_input_computed_from_another():
    """The gradient of A is the op's own, not also what x has of it."""
    op, (x, a, b, bias) = lora_linear("reference", 0.0)
    loss = op(x * a.sum(), a, b, bias).square().sum()
    (once,) = torch.autograd.grad(loss, a, retain_graph=True)
    (twice,) = torch.autograd.grad(loss, a, create_graph=True)
    torch.testing.assert_close(twice, once)


def test_columns_of_which_x_is_not_kept():
    weight, index = new(4, 5, train=False), torch.tensor([0, 2], device=DEVICE)
    part, x = weight[:, index].detach().requires_grad_(), new(3, 5)
    y = ops.row_linear(x, weight, part, index, columns=True)
    with pytest.raises(RuntimeError, match="row_linear: create_graph=True with columns=True"):
        torch.autograd.grad(y.sum(), part, create_graph=True)
    y = ops.row_linear(x.detach(), weight, part, index, columns=True)
    (gradient,) = torch.autograd.grad(y.square().sum(), part, create_graph=True)
    assert gradient.requires_grad


@pytest.mark.parametrize(
    "config", [fastpeft.Lora(r=2, targets=["0"], init="random"), fastpeft.Selective(rows={"0": [1, 2]})]
)
def test_a_gradient_penalty_through_an_attached_model(config):
    model, x = nn.Sequential(nn.Linear(4, 4)).to(DEVICE, FP64), new(3, 4)
    fastpeft.attach(model, config)
    (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    gradient.square().sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
