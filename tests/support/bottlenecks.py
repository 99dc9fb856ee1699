"""Bottleneck adapters on models of every family."""

import torch

import fastpeft
from fastpeft import Bottleneck
from fastpeft.methods.bottleneck.holder import Bottlenecks
from tests.support.models import build

PRESETS = ["seq_bn", "double_seq_bn", "par_bn", "scaled_par_bn", "adapter_plus"]


def attached(name, config=None, adapter="default", model=None):
    torch.manual_seed(1)
    return fastpeft.attach(model or build(name), config or Bottleneck(reduction_factor=4), adapter)


def move(model, seed=3):
    """Every trained parameter by a third of a standard deviation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) / 3)
    return model.eval()


def holders(model):
    return [module for module in model.modules() if isinstance(module, Bottlenecks)]
