"""A small model of our own whose trained parameters have moved, for checkpoints."""

import pytest
import torch
from torch import nn

import fastpeft
from fastpeft import Lora

safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"q_proj": nn.Linear(8, 8), "out": nn.Linear(8, 8)}) for _ in range(3)
        )
        self.norm = nn.LayerNorm(8)
        self.score = nn.Linear(8, 3)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer["out"](layer["q_proj"](x).tanh())
        return self.score(self.norm(x))


def build(seed=0):
    torch.manual_seed(seed)
    return Net()


X = torch.linspace(-1, 1, 40).view(5, 8)


def trained(**settings):
    """A model whose every trained parameter has moved."""
    model = fastpeft.attach(build(), Lora(**{"r": 4, **settings}))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) / 4)
    return model.eval()
