"""Gated MLPs with DoRA after accelerate and attach: PEFT's numbers, over dense and quantised weights."""

import copy
import re

import pytest
import torch
from torch import nn

import fastpeft
from fastpeft import ops
from fastpeft.nn import quantised
from fastpeft.testing import assert_no_worse
from tests.support.gated_mlps import adapted, base, mlps, peft, results, rows
from tests.support.models import IDS

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
NAMES = ("gate_proj", "up_proj", "down_proj")


def spread(model):
    """Magnitudes as after some training: gains other than 1."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model


def dora(model=None, **options):
    return spread(adapted(base() if model is None else model, use_dora=True, **options))


def first(model):
    return model.base_model.model.model.layers[0].mlp


def assert_near(found, wanted, rtol, atol):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=rtol, atol=atol, msg=name)


@pytest.mark.parametrize("family", ["llama", "gemma", "gemma, erf"])
def test_pefts_outputs_and_gradients(family, calls):
    """In float64, where a model's depth does not turn rounding into anything that shows."""
    model = dora(base(family).double())
    ours = fastpeft.accelerate(copy.deepcopy(model), strict=True)
    assert [str(row) for row in rows(ours)] == ["fused (reference)"] * 2
    theirs = results(model)
    for step in range(4):  # plans come with the third
        assert_near(results(ours), theirs, 1e-9, 1e-11)
        assert len(calls) == 2 * (step + 1)


@pytest.mark.parametrize("dtype", [FP32, BF16, torch.float16, None], ids=str)
def test_an_mlp_is_no_less_accurate_than_pefts(dtype, calls):
    """On its own, with float32 adapters; None is float32 under autocast to bfloat16."""
    model = dora(base("llama", hidden_size=64, intermediate_size=320).to(dtype or FP32))
    mlp, theirs = first(fastpeft.accelerate(model)), first(fastpeft.restore(copy.deepcopy(model)))
    exact = copy.deepcopy(theirs).double()
    torch.manual_seed(4)
    x, dy = torch.randn(2, 67, 64, dtype=dtype), torch.randn(2, 67, 64, dtype=dtype or BF16)
    found = []
    for module in (mlp, theirs, exact):
        wide = module is exact
        given = (x.double() if wide else x).clone().requires_grad_()
        with torch.autocast("cpu", BF16, enabled=dtype is None and not wide):
            y = module(given)
        leaves = [given, *(p for p in module.parameters() if p.requires_grad)]
        found.append([y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))])
    assert len(calls) == 1
    for ours, yardstick, value in zip(*found, strict=True):
        assert_no_worse(ours, yardstick.to(ours.dtype), value)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_dropout_and_checkpoints_of_both_kinds(dtype, reentrant):
    """The node, with and without checkpointing, draws what three layers draw."""
    model = dora(base().to(dtype), dropout=0.3)
    plain = fastpeft.accelerate(copy.deepcopy(model), fuse_mlp=False)
    assert not mlps(plain)
    ours = fastpeft.accelerate(model)
    if reentrant is not None:
        ours.enable_input_require_grads()
        ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for _ in range(4):
        found, wanted = results(ours), results(plain)
        for name, value in wanted.items():
            scale = value.float().abs().max()
            assert (found[name].float() - value.float()).abs().max() <= 32 * torch.finfo(dtype).eps * scale, name


def test_ten_steps_have_pefts_losses():
    curves = []
    for way in (lambda model: model, fastpeft.accelerate):
        model = way(dora())
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


def test_attached_saved_and_loaded(calls, tmp_path):
    config = fastpeft.Lora(r=4, init="random", dora=True, targets="all-linear")
    model = spread(fastpeft.attach(base(), config))
    assert [str(row) for row in rows(model)] == ["fused (reference)"] * 2
    found = results(model)
    assert len(calls) == 2
    fastpeft.save(model, tmp_path)
    loaded = fastpeft.load(base(), tmp_path, is_trainable=True).train()
    assert len(mlps(loaded)) == 2
    assert_near(results(loaded), found, 0, 0)
    plain = fastpeft.attach(base(), fastpeft.Lora(r=4, dora=True, targets="all-linear", fuse_mlp=False))
    for (_, a), (_, b) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        b.data.copy_(a)
    calls.clear()
    assert_near(results(plain), found, 1e-4, 1e-5)
    assert not calls


@pytest.mark.parametrize("lora", ["gate_proj", "up_proj", "down_proj"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_projection_with_lora_beside_dora(lora, dropout, calls):
    """As where layers were given their adapters one by one."""
    model = dora(base().double(), dropout=dropout)
    for layer in model.base_model.model.model.layers:
        projection = getattr(layer.mlp, lora)
        projection.lora_variant.pop("default")
        projection.use_dora["default"] = False
        projection.lora_magnitude_vector.pop("default")
    plain = copy.deepcopy(model)
    wanted = results(fastpeft.accelerate(plain, fuse_mlp=False) if dropout else plain)
    found = results(fastpeft.accelerate(model))
    assert len(calls) == 2
    assert_near(found, wanted, 1e-9, 1e-11)


def _magnitude_replaced(mlp):
    layer = mlp.up_proj.lora_magnitude_vector["default"]
    layer.weight = nn.Parameter(layer.weight.detach() * 1.5)


def _magnitude_hooked(mlp):
    mlp.up_proj.lora_magnitude_vector["default"].register_forward_hook(lambda *_: None)
    return "up_proj: adapter 'default' is DoRA, whose magnitude has hooks"


def _weight_trained(mlp):
    mlp.down_proj.base_layer.weight.requires_grad_()
    return "down_proj: its adapter is DoRA, and base_layer.weight is trained"


def _evaluated(mlp):
    mlp.gate_proj.training = False


@pytest.mark.parametrize("change", [_magnitude_replaced, _magnitude_hooked, _weight_trained, _evaluated])
def test_what_changes_is_seen_at_the_next_call(change, calls):
    """After plans and guards were made; what cannot be served has PEFT's numbers too."""
    model, ours = dora(base().double()), fastpeft.accelerate(dora(base().double()))
    for _ in range(3):
        results(ours)
    said = change(mlps(ours)[0])
    change(first(model))
    calls.clear()
    assert_near(results(ours), results(model), 1e-9, 1e-11)
    assert len(calls) == (2 if said is None else 1)
    status = str(rows(ours)[0])
    assert status == "fused (reference)" if said is None else re.fullmatch(f"not fused: {said}", status)


def test_compiled(calls):
    torch._dynamo.reset()
    model = fastpeft.accelerate(dora())
    wanted = results(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = {name.removeprefix("_orig_mod."): value for name, value in results(compiled).items()}
    assert_near(found, wanted, 1e-5, 1e-6)


def test_restored():
    model = fastpeft.accelerate(dora())
    assert len(mlps(model)) == 2
    assert not mlps(fastpeft.restore(model))


def exact(mlp):
    """The same in float64, on the weights as their library writes them out."""
    made = copy.deepcopy(mlp)
    for name in NAMES:
        layer, weight = getattr(made, name), quantised.written(getattr(mlp, name).base_layer, FP32)
        layer.base_layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.base_layer.weight.data = weight

    def forward(x):
        def linear(name, x):
            layer = getattr(made, name)
            a, b = (part["default"].weight for part in (layer.lora_A, layer.lora_B))
            merged = layer.base_layer.weight + layer.scaling["default"] * b @ a
            low = layer.scaling["default"] * x @ a.T @ b.T
            gain = layer.lora_magnitude_vector["default"].weight / merged.norm(dim=1).detach()
            return gain * (x @ layer.base_layer.weight.T + low)

        return linear("down_proj", nn.functional.silu(linear("gate_proj", x)) * linear("up_proj", x))

    return made.double(), forward


@pytest.mark.parametrize("bits", ["nf4", "int8"])
def test_over_quantised_weights_no_less_accurate_than_layers(bits, calls):
    """With float32 adapters; few rows are the layers'."""
    models = pytest.importorskip("tests.support.quantised_models", reason="bitsandbytes is not installed")
    config = peft.LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False, use_dora=True)
    torch.manual_seed(1)
    model = spread(peft.get_peft_model(models.load(bits=bits), config)).train()
    model(models.ids())  # int8 is quantised by then
    apart = first(fastpeft.accelerate(copy.deepcopy(model), fuse_mlp=False))
    truth, forward = exact(first(model))
    mlp = first(fastpeft.accelerate(model, strict=True))
    assert {row.status for row in rows(model)} == {"fused"}
    torch.manual_seed(4)
    x, dy = torch.randn(2, 67, 64).to(BF16), torch.randn(2, 67, 64).to(BF16)

    def computed(module, call, x, dy):
        x = x.clone().requires_grad_()
        y = call(x)
        trained = [p for name, p in module.named_parameters() if "lora_" in name]
        return [y, *torch.autograd.grad(y, [x, *trained], dy.to(y.dtype))]

    right, yardstick = computed(truth, forward, x.double(), dy.double()), computed(apart, apart, x, dy)
    for step in range(4):
        for one, other, value in zip(computed(mlp, mlp, x, dy), yardstick, right, strict=True):
            assert_no_worse(one, other, value, str(step))
    assert len(calls) == 4
    mlp(x[0, :32])
    assert len(calls) == 4
    assert isinstance(quantised.base_of(mlp.up_proj.base_layer), ops.Base)
