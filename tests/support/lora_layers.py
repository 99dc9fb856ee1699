"""One LoRA layer beside its definition."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from fastpeft.nn import LoraLinear

M, K, N = 5, 12, 7


EPS = torch.finfo(torch.float64).eps


class Conv1D(nn.Module):
    """transformers' layer without transformers: weight [K, N]."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf) / math.sqrt(nx))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


def base(kind="linear", dtype=torch.float64):
    torch.manual_seed(0)
    layer = Conv1D(N, K) if kind == "conv1d" else nn.Linear(K, N, bias=kind == "linear")
    return layer.to(dtype)


def build(kind="linear", dtype=torch.float64, **settings):
    return LoraLinear(base(kind, dtype), **{"r": 3, "alpha": 6, "init": "random", **settings})


def definition(layer, x, names=("default",)):
    """y = x Wᵀ + bias + Σ scale · (x Aᵀ) Bᵀ + scale · lora_bias, with a scale of its own making."""
    y = layer.base_layer(x)
    for adapter in (layer.adapters[name] for name in names):
        scale = adapter.alpha / (adapter.r**0.5 if adapter.rslora else adapter.r)
        y = y + scale * F.linear(F.linear(x, adapter.lora_A), adapter.lora_B, adapter.lora_bias)
    return y


def close(actual, expected):
    """Both are sums of at most K + r + 2 products; each product and sum rounds once, in either order."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    bound = 4 * (K + N + M) * EPS * max(1.0, expected.abs().max().item()) * 16
    assert (actual - expected).abs().max().item() <= bound


def gradients(y, layer, x):
    parameters = [p for p in layer.parameters() if p.requires_grad]
    grad = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return torch.autograd.grad(y, [x, *parameters], grad)
