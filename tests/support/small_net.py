"""A small model of our own with attention, and LoRA adapters on it."""

import torch
from torch import nn

import fastpeft
from fastpeft import Lora

# float64 sums of some hundred products in another order.
TOLERANCE = 2**10 * torch.finfo(torch.float64).eps


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 8)
        self.out = nn.Linear(8, 8)

    def forward(self, x):
        h = self.norm(x)
        return x + self.out(self.q_proj(h) * self.k_proj(h).tanh() + self.v_proj(h))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.score = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x):
        h = self.embed(x)
        for layer in self.layers:
            h = layer(h)
        return self.score(h)


X = torch.arange(22).view(2, 11) % 11


def build():
    torch.manual_seed(0)
    net = Net().double()
    net.layers[0].norm.weight.requires_grad_(False)
    return net


def attached(name="default", model=None, **settings):
    model = build() if model is None else model
    torch.manual_seed(1)
    return fastpeft.attach(model, Lora(**{"r": 4, "init": "random", **settings}), name)


def train(model, steps=2):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()
