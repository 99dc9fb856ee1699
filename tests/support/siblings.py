"""An attention whose three projections may read one tensor."""

import copy
from contextlib import contextmanager

import torch
from torch import nn

from fastpeft.nn import LoraLinear, share_inputs, sharing

M, K = 6, 16


NAMES = ("q_proj", "k_proj", "v_proj")


# float64 results of two orders of summation over some hundred products, in values of order 1.
TOLERANCE = 2**10 * torch.finfo(torch.float64).eps


class Attention(nn.Module):
    """q of x, k and v of another tensor where there is one; then something that mixes all three."""

    def __init__(self, dropout=0.0, noise=0.0, **settings):
        super().__init__()
        for name, n, r in zip(NAMES, (K, 8, K), (3, 2, 4), strict=True):
            layer = LoraLinear(nn.Linear(K, n).double(), r=r, init="random", dropout=dropout, **settings)
            setattr(self, name, layer)
        self.noise = noise

    def forward(self, x, other=None):
        other = x if other is None else other
        q = self.q_proj(x)
        if self.noise:
            q = nn.functional.dropout(q, self.noise)  # draws between two siblings
        k, v = self.k_proj(other), self.v_proj(other)
        return torch.cat([q * v, k], -1).tanh()

    @property
    def group(self):
        return self.q_proj.fastpeft_shared


def counted(monkeypatch):
    """A list that has the number of projections of every call that computes for siblings from here on."""
    counts, outputs = [], sharing._Plan.outputs

    def count(plan, x):
        counts.append(len(plan.branches))
        return outputs(plan, x)

    monkeypatch.setattr(sharing._Plan, "outputs", count)
    return counts


@contextmanager
def calling(group):
    """Inside the block siblings are called as by the module that holds them."""
    group.begin()
    try:
        yield
    finally:
        group.end()


def build(shared=True, **settings):
    torch.manual_seed(0)
    model = Attention(**settings)
    if shared:
        assert len(share_inputs(model, lambda module: isinstance(module, LoraLinear))) == 1
    return model


def input_(rows=M, seed=1):
    return torch.randn(rows, K, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def step(model, *tensors, run=None, seed=5):
    """Outputs and all gradients of one step."""
    torch.manual_seed(seed)
    model.zero_grad()
    for tensor in tensors:
        tensor.grad = None
    y = (model if run is None else run)(*tensors)
    y.square().sum().backward()
    gradients = [t.grad for t in (*tensors, *model.parameters())]
    return [y.detach(), *(grad for grad in gradients if grad is not None)]


def assert_same(actual, expected):
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert (a - e).abs().max() <= TOLERANCE * max(1, e.abs().max())


def alone_is(model, name, x):
    """The sibling's output without a group."""
    layer = copy.deepcopy(getattr(model, name))
    layer.__dict__.pop("fastpeft_shared", None)
    return layer(x)
