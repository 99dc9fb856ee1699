"""Attached models under ``torch.func``, forward mode and ``torch.jit.trace``: what plain PyTorch gives."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jvp, vmap

import fastpeft
from fastpeft import Bottleneck, Lora, Selective
from tests.support.small_net import TOLERANCE, X, build

CONFIGS = {
    "lora": Lora(r=2, init="random"),
    "lora with biases": Lora(r=2, init="random", lora_bias=True, bias="all", share_inputs=False),
    "bottleneck": Bottleneck(targets=["out"], init="houlsby", original_norm_before=False),
    "rows and tokens": Selective(rows={"out": [0, 3], "score.0": [1]}, tokens=[1, 2]),
    "columns": Selective(columns={"k_proj": [2], "score.2": [0, 5]}),
    "whole": Selective(params="norm"),
}


@pytest.fixture(params=CONFIGS)
def model(request):
    torch.manual_seed(1)
    model = fastpeft.attach(build(), CONFIGS[request.param])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def close(actual, expected):
    assert (actual - expected).abs().max() <= TOLERANCE * expected.abs().max().clamp_min(1e-3)


def loss_of(model):
    return lambda parameters, x: functional_call(model, parameters, (x,)).square().sum()


def test_grad(model):
    found = grad(loss_of(model))(trained(model), X)
    model(X).square().sum().backward()
    for name, parameter in trained(model).items():
        close(found[name], parameter.grad)


def test_gradients_of_each_sample(model):
    found = vmap(grad(loss_of(model)), in_dims=(None, 0))(trained(model), X[:, None])
    for i, sample in enumerate(X):
        model.zero_grad()
        model(sample[None]).square().sum().backward()
        for name, parameter in trained(model).items():
            close(found[name][i], parameter.grad)


def test_vmap(model):
    close(vmap(model)(X[:, None]), model(X)[:, None])


def test_forward_mode(model):
    parameters = {name: p.detach() for name, p in trained(model).items()}
    along = {name: torch.ones_like(p) for name, p in parameters.items()}
    y, tangent = jvp(lambda p: functional_call(model, p, (X,)), (parameters,), (along,))
    close(y, model(X))
    expected = sum((g * along[n]).sum() for n, g in grad(loss_of(model))(parameters, X).items())
    close(2 * (y * tangent).sum(), expected)
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(p, along[name]) for name, p in parameters.items()}
        close(forward_ad.unpack_dual(functional_call(model, duals, (X,))).tangent, tangent)


@pytest.mark.parametrize("model", [name for name in CONFIGS if name != "columns"], indirect=True)
def test_second_derivatives(model):
    """Of columns the op itself, which they are compared with, has none."""
    name, parameter = min(trained(model).items(), key=lambda item: item[1].numel())
    found = hessian(lambda p: loss_of(model)({name: p}, X))(parameter.detach())
    expected = torch.autograd.functional.hessian(lambda p: loss_of(model)({name: p}, X), parameter.detach())
    close(found, expected)


@pytest.mark.filterwarnings(
    "ignore:.*torch.jit:DeprecationWarning", "ignore:Converting a tensor:torch.jit.TracerWarning"
)
def test_trace(model, tmp_path):
    traced = torch.jit.trace(model, X)
    torch.jit.save(traced, tmp_path / "model.pt")
    for each in (traced, torch.jit.load(tmp_path / "model.pt")):
        close(each(X[:, :5]), model(X[:, :5]))


def test_memory_holds_what_was_trained_afterwards(model):
    """A transform leaves the live weights as they were, and the next call writes them."""
    before = model(X)
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.add_(0.1)
    grad(loss_of(model))(trained(model), X)
    y = model(X)
    assert not torch.equal(y, before)
    close(functional_call(model, trained(model), (X,)), y)


@pytest.mark.filterwarnings("ignore:Sparse.*beta:UserWarning", "ignore:The PyTorch API of nested:UserWarning")
@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr", "to_sparse_csc", "nested"])
def test_inputs_of_other_layouts(layout):
    model = nn.Sequential(nn.Linear(6, 5))
    fastpeft.attach(model, Lora(r=2, targets=["0"], init="random"))
    x = torch.eye(3, 6)
    expected = model(x)
    if layout == "nested":
        assert all(torch.allclose(y, expected) for y in model(torch.nested.nested_tensor([x, x])).unbind())
    else:
        torch.testing.assert_close(model(getattr(x, layout)()), expected)
    with fastpeft.disable_adapter(model):
        torch.testing.assert_close(model(x.to_sparse()), model(x))
