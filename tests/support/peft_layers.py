"""A small model with PEFT's layers, shared by the tests of one layer and of a model's whole life."""

import contextlib

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import fastpeft
from fastpeft.integrations import _fusable
from fastpeft.integrations import peft as integration

IDS = torch.arange(10).view(2, 5)


class Model(nn.Module):
    """Two linear layers, an embedding and a convolution."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(16, 12)
        self.conv = nn.Conv1d(12, 12, 1)
        self.up = nn.Linear(12, 20)
        self.down = nn.Linear(20, 6, bias=False)

    def forward(self, ids):
        x = self.conv(self.embed(ids).mT).mT
        return self.down(self.up(x).relu())


def config(**settings):
    return LoraConfig(
        **{"r": 4, "lora_alpha": 8, "init_lora_weights": False, "target_modules": ["up", "down"], **settings}
    )


def peft_model(dtype=torch.float32, **settings):
    torch.manual_seed(0)
    return get_peft_model(Model().to(dtype), config(**settings))


def up(model):
    """The layer that a case changes."""
    return model.base_model.model.up


def statuses(model):
    return {layer.path.rpartition(".")[2]: layer.status for layer in fastpeft.report(model)}


@contextlib.contextmanager
def counted(monkeypatch):
    """One entry for each call that the fused op serves: its number of adapters."""
    calls = []
    run, computed = _fusable.run, integration.computed

    def at_once(layer, x):
        y = computed(layer, x)
        if y is not None and layer.fastpeft_shared is None:
            calls.append(1)
        return y

    with monkeypatch.context() as patch:
        patch.setattr(integration, "computed", at_once)
        patch.setattr(_fusable, "run", lambda x, branches: calls.append(len(branches)) or run(x, branches))
        yield calls


def assert_pefts(model, plain, calls=2, monkeypatch=None, tolerance=1e-6):
    """Same output, and so many calls were fused."""
    with counted(monkeypatch) as fused:
        torch.testing.assert_close(model(IDS), plain(IDS), rtol=tolerance, atol=tolerance)
    assert len(fused) == calls
