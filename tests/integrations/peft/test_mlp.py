"""Gated MLPs after accelerate and attach: PEFT's numbers, found by what they are, left alone where they are unusual."""

import copy
import functools
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastpeft
from fastpeft import ops
from fastpeft.nn import LoraMlp
from fastpeft.nn.gated_mlps import activation_of
from fastpeft.testing import assert_no_worse
from tests.support.models import IDS, SIZES, VOCAB, transformers

peft = pytest.importorskip("peft", reason="peft is not installed")

_HEADS = {"vocab_size": VOCAB, "num_key_value_heads": 2, "initializer_range": 0.15, "pad_token_id": 0}
FAMILIES = {
    "llama": ("Llama", {"mlp_bias": True}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "mistral": ("Mistral", {}),
    "gemma": ("Gemma", {"head_dim": 8}),
    "gemma, erf": ("Gemma", {"head_dim": 8}),
}
family = pytest.mark.parametrize("family", FAMILIES)


def base(family="llama", **changes):
    name, values = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **_HEADS, **values, **changes})
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).train()
    for layer in model.model.layers if family == "gemma, erf" else ():
        layer.mlp.act_fn = nn.GELU()
    return model


def adapted(model, dropout=0.0, **options):
    config = peft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=dropout, init_lora_weights=False, **options)
    torch.manual_seed(1)
    return peft.get_peft_model(model, config).train()


def results(model):
    torch.manual_seed(2)
    found = model(input_ids=IDS, labels=IDS)
    if found.loss.requires_grad:
        found.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return {"logits": found.logits.detach(), **grads}


def mlps(model):
    return [module for module in model.modules() if isinstance(module, LoraMlp)]


def rows(model):
    return [row for row in fastpeft.report(model) if row.kind == "gated MLPs"]


@pytest.fixture
def calls(monkeypatch):
    """Which activation every call of the op had."""
    seen, op = [], ops.lora_mlp

    @functools.wraps(op)
    def counted(*args, **kwargs):
        seen.append(kwargs["activation"])
        return op(*args, **kwargs)

    monkeypatch.setattr(ops, "lora_mlp", counted)
    return seen


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
