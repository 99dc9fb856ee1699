"""What float32 adapters mean under autocast: PEFT rounds them and their gradients to its dtype, ours stay float32."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.functional import linear

import fastpeft
from fastpeft.testing import assert_no_worse, error_vs_eager

SCALE = 2.0


def model_of(dtype):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(192, 160, dtype=dtype))
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["0"]))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def parts(model):
    """W, bias, A and B."""
    names = ("base_layer.weight", "base_layer.bias", "lora_A.default.weight", "lora_B.default.weight")
    return [model.get_parameter(f"base_model.model.0.{name}").detach() for name in names]


def solve(function, x, a, b, dy):
    """The output and the gradients of x, A and B."""
    leaves = [t.detach().requires_grad_() for t in (x, a, b)]
    y = function(*leaves)
    return dict(
        zip(("y", "dx", "da", "db"), (y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))), strict=True)
    )


def called(model, x, dy):
    """The same of a model whose adapters are its own."""
    x = x.detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    leaves = [x, *(p for name, p in model.named_parameters() if "lora_" in name)]
    return dict(
        zip(("y", "dx", "da", "db"), (y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))), strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_what_each_computes(dtype):
    model = model_of(dtype)
    weight, bias, a, b = parts(model)
    x, dy = (torch.randn(256, size, generator=torch.Generator().manual_seed(size)).to(dtype) for size in (192, 160))
    theirs = called(model, x, dy)
    ours = called(fastpeft.accelerate(copy.deepcopy(model), strict=True), x, dy)
    low = [t.to(torch.bfloat16) for t in (x, weight, bias, dy)]

    def exactly(x, a, b):
        return linear(x, low[1].double(), low[2].double()) + SCALE * linear(linear(x, a), b)

    def rounded(x, a, b):
        return fastpeft.ops.lora_linear(x, low[1], a, b, low[2], SCALE)

    exact = solve(exactly, low[0].double(), a.double(), b.double(), low[3].double())
    a16, b16 = a.to(torch.bfloat16), b.to(torch.bfloat16)
    exact16 = solve(exactly, low[0].double(), a16.double(), b16.double(), low[3].double())
    ours16 = solve(rounded, low[0], a16, b16, low[3])
    for name in exact:
        assert ours[name].dtype == theirs[name].dtype
        assert error_vs_eager(ours[name], theirs[name], exact[name]).ok, name
        # PEFT's call is the one with rounded adapters, and no better than it.
        assert_no_worse(ours16[name], theirs[name].to(torch.bfloat16), exact16[name], name)
    for name in ("da", "db"):
        size = exact[name].square().mean().sqrt()
        errors = [(found[name] - exact[name]).square().mean().sqrt() / size for found in (ours, theirs)]
        assert errors[0] < 0.01 * torch.finfo(torch.bfloat16).eps < 0.1 * torch.finfo(torch.bfloat16).eps < errors[1]
