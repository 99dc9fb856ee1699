"""Gated MLPs in which something is not as accelerate found it: their own forward runs, with PEFT's numbers."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastpeft
from tests.support.gated_mlps import adapted, base, mlps, peft, results, rows


def _hooked(model, mlp):
    mlp.up_proj.register_forward_hook(lambda *_: None)
    return "up_proj: it has hooks"


def _hooked_inside(model, mlp):
    mlp.down_proj.base_layer.register_forward_hook(lambda *_: None)
    return "down_proj: its base layer is called"


def _hooked_activation(model, mlp):
    mlp.act_fn.register_forward_hook(lambda *_: None)
    return "its activation has hooks"


def _disabled(model, mlp):
    model.base_model.disable_adapter_layers()
    return "gate_proj: its adapters are disabled"


def _merged(model, mlp):
    mlp.gate_proj.merge()
    return "gate_proj: its adapters are merged into the base layer"


def _another_activation(model, mlp):
    mlp.act_fn = nn.Tanh()
    return r"its activation is Tanh\(\)"


def _two_adapters(model, mlp):
    torch.manual_seed(3)
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    return "gate_proj: several adapters are active"


def _patched_instance(model, mlp):
    mlp.forward = lambda x: mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
    return "its forward is overridden on the instance"


UNUSUAL = [
    _hooked, _hooked_inside, _hooked_activation, _disabled, _merged, _another_activation, _two_adapters,
    _patched_instance,
]  # fmt: skip


@pytest.mark.parametrize("change", UNUSUAL, ids=lambda change: change.__name__[1:])
def test_whatever_is_unusual_is_seen_at_the_next_call(change, calls):
    """After plans and guards were made: the module's own forward runs, with PEFT's numbers."""
    model, ours = adapted(base()), fastpeft.accelerate(adapted(base()))
    for _ in range(3):
        results(ours)
    assert len(calls) == 6
    said = change(ours, mlps(ours)[0])
    change(model, model.base_model.model.model.layers[0].mlp)
    calls.clear()
    found, wanted = results(ours), results(model)
    assert len(calls) <= 1  # the other layer's
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)
    assert re.fullmatch(f"not fused: {said}", str(rows(ours)[0]))


def test_a_class_that_is_patched_is_seen(monkeypatch, calls):
    ours = fastpeft.accelerate(adapted(base()))
    results(ours)
    kind = mlps(ours)[0].fastpeft_plain

    def patched(self, x):
        return self.down_proj(self.up_proj(x))

    monkeypatch.setattr(kind, "forward", patched)
    calls.clear()
    found = results(ours)
    assert not calls
    assert "was replaced" in rows(ours)[0].status
    theirs = results(adapted(base()))
    torch.testing.assert_close(found["logits"], theirs["logits"])
    fastpeft.restore(ours)
    assert not mlps(fastpeft.accelerate(ours))  # nor is it known by that forward
    monkeypatch.undo()
    assert mlps(fastpeft.accelerate(ours))
