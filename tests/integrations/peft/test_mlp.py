"""Gated MLPs after accelerate and attach: PEFT's numbers, found by what they are."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastpeft
from fastpeft.nn.gated_mlps import activation_of
from fastpeft.testing import assert_no_worse
from tests.support.gated_mlps import FAMILIES, adapted, base, mlps, peft, results, rows
from tests.support.models import IDS, transformers

family = pytest.mark.parametrize("family", FAMILIES)


@family
def test_pefts_outputs_and_gradients(family, calls):
    """In float64, where a model's depth does not turn rounding into anything that shows."""
    model = adapted(base(family).double())
    ours = fastpeft.accelerate(copy.deepcopy(model), strict=True)
    assert len(mlps(ours)) == 2
    assert [str(row) for row in rows(ours)] == ["fused (reference)"] * 2
    theirs, found = results(model), results(ours)
    assert len(calls) == 2
    assert found.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, None], ids=str)
@family
def test_an_mlp_is_no_less_accurate_than_pefts(family, dtype, calls):
    """On its own, with float32 adapters; None is float32 under autocast to bfloat16."""
    model = adapted(base(family, hidden_size=64, intermediate_size=192).to(dtype or torch.float32))
    mlp = model.base_model.model.model.layers[0].mlp
    fastpeft.accelerate(model)
    theirs = fastpeft.restore(copy.deepcopy(model))
    exact = copy.deepcopy(theirs).double()
    theirs, exact = (other.base_model.model.model.layers[0].mlp for other in (theirs, exact))
    torch.manual_seed(4)
    x, dy = torch.randn(2, 67, 64, dtype=dtype), torch.randn(2, 67, 64, dtype=dtype or torch.bfloat16)
    found = []
    for module in (mlp, theirs, exact):
        wide = module is exact
        given = (x.double() if wide else x).clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is None and not wide):
            y = module(given)
        leaves = [given, *(p for p in module.parameters() if p.requires_grad)]
        found.append([y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))])
    assert len(calls) == 1
    for ours, yardstick, value in zip(*found, strict=True):
        assert_no_worse(ours, yardstick, value)


def test_the_activations_are_those_of_the_families(calls):
    for name in FAMILIES:
        results(fastpeft.accelerate(adapted(base(name))))
    assert calls[::2] == ["silu"] * 4 + ["gelu_tanh", "gelu"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_dropout_and_checkpoints_of_both_kinds(dtype, reentrant):
    """The node, with and without checkpointing, draws what three layers draw."""
    model = adapted(base().to(dtype), dropout=0.3)
    plain = fastpeft.accelerate(copy.deepcopy(model), fuse_mlp=False)
    ours = fastpeft.accelerate(model)
    if reentrant is not None:
        ours.enable_input_require_grads()
        ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for _ in range(4):  # plans come with the third
        found, wanted = results(ours), results(plain)
        for name, value in wanted.items():
            scale = value.float().abs().max()
            assert (found[name].float() - value.float()).abs().max() <= 16 * torch.finfo(dtype).eps * scale, name


def test_ten_steps_have_pefts_losses():
    curves = []
    for way in (lambda model: model, fastpeft.accelerate):
        model = way(adapted(base()))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        curve = []
        for _ in range(10):
            loss = model(input_ids=IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curve.append(loss.item())
        curves.append(curve)
    theirs, ours = map(torch.tensor, curves)
    assert theirs[-1] < theirs[0] - 0.5
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_attached_models_are_found_too(calls):
    model = fastpeft.attach(base(), fastpeft.Lora(r=4, init="random"))
    assert len(mlps(model)) == len(rows(model)) == 2
    found = results(model)
    assert len(calls) == 2
    whole = fastpeft.attach(base(), fastpeft.Lora(r=4, init="random", fuse_mlp=False))
    assert not mlps(whole)
    for (_, a), (_, b) in zip(model.named_parameters(), whole.named_parameters(), strict=True):
        b.data.copy_(a)
    for name, value in results(whole).items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)
    fastpeft.detach(model)
    assert not mlps(model)


def test_restore_and_settings():
    model = fastpeft.accelerate(adapted(base()))
    kinds = {type(mlp) for mlp in mlps(model)}
    assert len(kinds) == 1
    fastpeft.accelerate(model)  # again
    assert {type(mlp) for mlp in mlps(model)} == kinds
    fastpeft.accelerate(model, fuse_mlp=False)
    assert not mlps(model)
    fastpeft.restore(fastpeft.accelerate(model))
    assert not mlps(model)
    assert not any("fastpeft_kept" in module.__dict__ for module in model.modules())


def test_copies_and_pickles():
    model = fastpeft.accelerate(adapted(base()))
    wanted = results(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len(mlps(other)) == 2
        assert {type(mlp) for mlp in mlps(other)} == {type(mlp) for mlp in mlps(model)}
        assert all(torch.equal(value, wanted[name]) for name, value in results(other).items())
        assert all("fastpeft_kept" not in mlp.__reduce_ex__(2)[2] for mlp in mlps(other))


def test_parts_of_an_mlp_are_no_mlp():
    config = peft.LoraConfig(r=4, target_modules=["gate_proj", "up_proj"])
    assert not mlps(fastpeft.accelerate(peft.get_peft_model(base(), config)))
    assert not mlps(fastpeft.attach(base(), fastpeft.Lora(r=4, targets=["down_proj"])))


def test_compiled(calls):
    torch._dynamo.reset()
    model = fastpeft.accelerate(adapted(base()))
    wanted = results(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = {name.removeprefix("_orig_mod."): value for name, value in results(compiled).items()}
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, msg=name)


def test_known_activations():
    tanh = nn.GELU(approximate="tanh")
    found = [activation_of(f) for f in (nn.SiLU(), F.silu, nn.GELU(), F.gelu, tanh, nn.ReLU(), torch.tanh, None)]
    assert found == ["silu", "silu", "gelu", "gelu", "gelu_tanh", None, None, None]
    names = ("silu", "swish", "gelu", "gelu_pytorch_tanh", "gelu_new", "relu", "gelu_fast", "quick_gelu")
    found = [activation_of(transformers.activations.ACT2FN[name]) for name in names]
    assert found == ["silu", "silu", "gelu", "gelu_tanh", "gelu_tanh", None, None, None]
