"""LoraLinear in every dtype, alone and under autocast."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastpeft.nn import LoraLinear, share_inputs
from tests.support.lora_layers import K, M, N, base, build, definition
from tests.support.siblings import calling


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", ["alone", "shared", "with another adapter", "base with hooks"])
def test_a_float32_lora_bias_is_not_rounded_to_the_bases_dtype(way, dtype):
    """1 + (0.25 + 0.375) eps is 1 + eps in 16 bits; it is 1 where 1 + 0.25 eps, the two biases, is rounded before."""
    eps = torch.finfo(dtype).eps
    layer = LoraLinear(nn.Linear(K, N).to(dtype), r=1, alpha=1, lora_bias=True)
    adapter = layer.adapters["default"]
    for tensor, value in ((layer.weight, 0), (layer.bias, 1), (adapter.lora_A, 1 / K), (adapter.lora_B, 0.375 * eps)):
        nn.init.constant_(tensor, value)
    nn.init.constant_(adapter.lora_bias, 0.25 * eps)
    if way == "with another adapter":
        layer.add_adapter("zero", r=1)
        layer.set_adapter(["default", "zero"])
    if way == "base with hooks":  # the base's output is 16-bit then: the low-rank term alone is seen in full
        layer.base_layer.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    if way == "shared":
        parent = nn.ModuleDict({"q_proj": layer, "k_proj": copy.deepcopy(layer)})
        (group,) = share_inputs(parent, lambda module: isinstance(module, LoraLinear))
    with calling(group) if way == "shared" else nullcontext():
        y = layer(torch.ones(2, K, dtype=dtype))
    assert y.dtype == dtype
    assert torch.equal(y, torch.full_like(y, 0.625 * eps if way == "base with hooks" else 1 + eps))
    if way == "shared":
        assert group.rounds == 1
    y.backward(torch.tensor([[1.0], [0.25 * eps]], dtype=dtype).expand(2, N))
    assert torch.equal(adapter.lora_bias.grad, torch.full((N,), 1 + 0.25 * eps))


def test_merged_weights_are_rounded_once():
    layer = build(dtype=torch.bfloat16)
    adapter = layer.adapters["default"]
    assert adapter.lora_A.dtype == torch.float32
    exact = layer.weight.double() + adapter.scale * adapter.lora_B.double() @ adapter.lora_A.double()
    layer.merge()
    # The unit roundoff of bfloat16, plus the float32 product's own rounding.
    assert ((layer.weight.double() - exact).abs() <= exact.abs() * 2**-8 * (1 + 2**-10) + 1e-7).all()


def test_half_precision_is_no_less_accurate_than_plain_pytorch():
    for dtype in (torch.bfloat16, torch.float16):
        torch.manual_seed(1)
        layer = LoraLinear(nn.Linear(64, 48).to(dtype), r=8, init="random")
        adapter = layer.adapters["default"]
        x = torch.randn(256, 64, dtype=dtype)
        w, b, a, u = (t.double() for t in (layer.weight, layer.bias, adapter.lora_A, adapter.lora_B))
        exact = x.double() @ w.T + b + adapter.scale * (x.double() @ a.T) @ u.T
        plain = layer.base_layer(x) + adapter.scale * F.linear(F.linear(x.float(), adapter.lora_A), adapter.lora_B)
        ours, theirs = (y.to(dtype).double() - exact for y in (layer(x), plain))
        assert ours.abs().max() <= 2 * theirs.abs().max()
        assert ours.square().mean().sqrt() <= 1.2 * theirs.square().mean().sqrt()


@pytest.mark.parametrize(
    ("base_dtype", "adapter_dtype", "found"),
    [
        (torch.bfloat16, None, torch.float32),
        (torch.float16, None, torch.float32),
        (torch.float32, None, torch.float32),
        (torch.float64, None, torch.float64),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float64, torch.float64),
        (torch.float64, torch.float32, torch.float32),
    ],
)
def test_adapter_dtypes(base_dtype, adapter_dtype, found):
    layer = LoraLinear(base(dtype=base_dtype), dtype=adapter_dtype, r=3, init="random")
    adapter = layer.adapters["default"]
    assert adapter.lora_A.dtype == adapter.lora_B.dtype == found
    x = torch.randn(M, K).to(base_dtype).requires_grad_()
    y = layer(x)
    assert y.dtype == base_dtype
    y.sum().backward()
    assert adapter.lora_A.grad.dtype == found
    exact = definition(copy.deepcopy(layer).double(), x.detach().double())
    eps = max(torch.finfo(d).eps for d in (base_dtype, torch.float32 if found == torch.float32 else found))
    assert (y.double() - exact).abs().max() <= 8 * eps * exact.abs().max()


def test_adapters_of_two_dtypes_at_once():
    layer = LoraLinear(base(dtype=torch.bfloat16), r=3, init="random")
    layer.add_adapter("b", dtype=torch.bfloat16, r=3, init="random")
    layer.set_adapter(["b", "default"])
    x = torch.randn(M, K, dtype=torch.bfloat16)
    exact = definition(copy.deepcopy(layer).double(), x.double(), ["b", "default"])
    assert (layer(x).double() - exact).abs().max() <= 8 * 2**-8 * exact.abs().max()


def test_autocast():
    layer = build(dtype=torch.float32)
    x = torch.randn(M, K, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.adapters["default"].lora_A.grad.dtype == x.grad.dtype == torch.float32
    exact = definition(copy.deepcopy(layer).double(), x.detach().double())
    assert (y.double() - exact).abs().max() <= 8 * 2**-8 * exact.abs().max()
