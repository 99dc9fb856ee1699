"""Calls of ops that repeat: their tensors, gradients and bits."""

import sys

import torch

from fastpeft import ops

RUNS = 5  # through Python, recorded, then as a plan; backward is recorded a call later


def new(*shape, dtype=torch.float32, grad=True, seed=0):
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=dtype)
    return made.requires_grad_(grad)


def lora(k=24, n=40, r=4, dtype=torch.float32, **grads):
    """W, A, B and a bias; by name, whether each asks for a gradient."""
    shapes = {"weight": (n, k), "lora_a": (r, k), "lora_b": (n, r), "bias": (n,)}
    asks = {"weight": False, "lora_a": True, "lora_b": True, "bias": False} | grads
    return {name: new(*shape, dtype=dtype, grad=asks[name]) for name, shape in shapes.items()}


def linear(x, scale=0.5, **parts):
    return ops.lora_linear(x, **parts, scale=scale), [x, *parts.values()]


def shared(x, dropout=0.0):
    branches = [lora(n=n, r=r) for n, r in ((40, 4), (16, 2), (32, 8))]
    seeds = [torch.tensor([seed]) for seed in (3, 4, 5)]
    columns = {f"{name}s": [b[name] for b in branches] for name in ("weight", "lora_a", "lora_b")}
    biases = [branches[0]["bias"], None, branches[2]["bias"]]
    ys = ops.lora_linear_shared(
        x, **columns, biases=biases, scales=[0.5, 1.0, 2.0], dropouts=[dropout] * 3, seeds=seeds
    )
    return torch.cat(ys, -1), [x, *columns["lora_as"], *columns["lora_bs"]]


def mlp(x, dropout=0.0, dtype=torch.float32):
    parts = [lora(k=k, n=n, r=r, dtype=dtype) for k, n, r in ((24, 40, 4), (24, 40, 2), (40, 16, 3))]
    columns = {f"{name}s": [p[name] for p in parts] for name in ("weight", "lora_a", "lora_b")}
    seeds = [torch.tensor([seed]) for seed in (3, 4, 5)]
    y = ops.lora_mlp(x, **columns, scales=[0.5, 1.0, 2.0], dropouts=[dropout] * 3, seeds=seeds)
    return y, [x, *columns["lora_as"], *columns["lora_bs"]]


def dora(x, dropout=0.0, dtype=torch.float32, norm=None, **grads):
    parts, magnitude = lora(dtype=dtype, **grads), new(40, dtype=dtype)
    x_w_a_b = x, parts["weight"], parts["lora_a"], parts["lora_b"]
    y = ops.dora_linear(*x_w_a_b, magnitude, parts["bias"], 0.5, dropout, torch.tensor([3]), norm)
    return y, [x, parts["lora_a"], parts["lora_b"], magnitude, parts["bias"]]


def dora_mlp(x, dropout=0.0):
    parts = [lora(k=k, n=n, r=r) for k, n, r in ((24, 40, 4), (24, 40, 2), (40, 16, 3))]
    columns = {f"{name}s": [p[name] for p in parts] for name in ("weight", "lora_a", "lora_b")}
    columns["magnitudes"] = [new(40), new(40, seed=1), new(16)]
    seeds = [torch.tensor([seed]) for seed in (3, 4, 5)]
    y = ops.dora_mlp(x, **columns, scales=[0.5, 1.0, 2.0], dropouts=[dropout] * 3, seeds=seeds)
    return y, [x, *columns["lora_as"], *columns["lora_bs"], *columns["magnitudes"]]


def mixed(x):
    slots = torch.tensor([0, 2, -1, 1, 2])
    a, b = new(3, 4, 24), new(3, 40, 4)
    return ops.multi_lora(x, a, b, slots, torch.tensor([0.5, 1.0, 2.0])), [x, a, b]


def bottleneck(x):
    down, up = new(6, 24), new(24, 6)
    return ops.bottleneck(x, down, new(6), up, new(24), residual=x, activation="relu", scale=0.7), [x, down, up]


def rows(x, columns=False):
    weight, index = new(40, 24, grad=False), torch.tensor([1, 5, 7])
    trained = new(40, 3) if columns else new(3, 24)
    return ops.row_linear(x, weight, trained, index, columns=columns), [x, trained]


def experts(x, dropout=0.0):
    """With an adapter on each projection; one of five rows has no expert."""
    index, weights = torch.tensor([[0, 2], [1, 2], [3, -1], [2, 0], [1, 3]]), new(5, 2)
    parts = new(4, 12, 24, grad=False), None, new(4, 2, 24), new(4, 12, 2)
    up = ops.ExpertLinear(*parts, scale=0.5, dropout=dropout)
    down = ops.ExpertLinear(
        new(4, 24, 6, grad=False), new(4, 24, grad=False), new(4, 3, 6), new(4, 24, 3), 2.0, dropout
    )
    y = ops.experts(x, index, weights, up, down, torch.nn.functional.glu, torch.arange(8).view(2, 4))
    return y, [x, weights, up.lora_a, up.lora_b, down.lora_a, down.lora_b]


def gradients(y, inputs):
    asked = [t for t in inputs if t is not None and t.requires_grad]
    return torch.autograd.grad(y.square().sum(), asked)


def bits(tensors):
    return [tensor.detach().contiguous().flatten().view(torch.uint8).clone() for tensor in tensors]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(bits(one), bits(other), strict=True))


def warm(x, parts, **settings):
    for _ in range(RUNS):
        y = ops.lora_linear(x, **parts, **settings)
        if y.requires_grad:
            gradients(y, [x, *parts.values()])
    return ops.lora_linear(x, **parts, **settings)


def planned(op):
    """The table of an op's plans."""
    return vars(sys.modules[op.__module__])["_planned"].plans
