"""Gated MLPs over quantised bases after accelerate and attach: found, as accurate as PEFT, else their own forward."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import fastpeft
from fastpeft import _backend, ops
from fastpeft.nn import LoraMlp, quantised
from fastpeft.testing import assert_no_worse
from tests.support.quantised_models import FORMATS, ids, load

BF16, FP32 = torch.bfloat16, torch.float32
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
each_format = pytest.mark.parametrize("bits", FORMATS)


def adapted(model, **settings):
    settings = {"r": 8, "target_modules": "all-linear", "init_lora_weights": False, **settings}
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(**settings)).train()


def mlps(model):
    return [module for module in model.modules() if isinstance(module, LoraMlp)]


def statuses(model):
    return {row.status for row in fastpeft.report(model) if row.kind == "gated MLPs"}


def exact(mlp):
    """The same in float64, on the weights as their library writes them out."""
    made = copy.deepcopy(mlp)
    for name in PROJECTIONS:
        layer, weight = getattr(made, name), quantised.written(getattr(mlp, name).base_layer, FP32)
        layer.base_layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.base_layer.weight.data = weight

    def forward(x):
        def linear(name, x):
            layer = getattr(made, name)
            a, b = (part["default"].weight for part in (layer.lora_A, layer.lora_B))
            return x @ layer.base_layer.weight.T + layer.scaling["default"] * x @ a.T @ b.T

        return linear("down_proj", nn.functional.silu(linear("gate_proj", x)) * linear("up_proj", x))

    return made.double(), forward


def computed(mlp, call, x, dy):
    x = x.clone().requires_grad_()
    y = call(x)
    trained = [p for name, p in mlp.named_parameters() if "lora_" in name]
    return [y, *torch.autograd.grad(y, [x, *trained], dy.to(y.dtype))]


@each_format
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_no_less_accurate_than_peft(bits, autocast, calls):
    """With float32 adapters; under autocast from a float32 input."""
    model = adapted(load(bits=bits))
    theirs = copy.deepcopy(model).base_model.model.model.layers[0].mlp
    mlp = fastpeft.accelerate(model, strict=True).base_model.model.model.layers[0].mlp
    assert statuses(model) == {"fused"}
    torch.manual_seed(4)
    x, dy = torch.randn(2, 67, 64).to(FP32 if autocast else BF16), torch.randn(2, 67, 64).to(BF16)
    plain, forward = exact(theirs)
    truth = computed(plain, forward, x.double(), dy.double())
    with torch.autocast("cpu", BF16, enabled=autocast):
        yardstick = computed(theirs, theirs, x, dy)
        for step in range(3):  # plans come with the third
            ours = computed(mlp, mlp, x, dy)
            for one, other, right in zip(ours, yardstick, truth, strict=True):
                assert one.dtype == (x.dtype if one is ours[0] else other.dtype)  # int8 of PEFT's is in autocast's
                assert_no_worse(one, other.to(one.dtype), right, str(step))
    assert len(calls) == 3


@each_format
@pytest.mark.parametrize("way", ["accelerate", "attach"])
def test_models_train_with_the_bits_of_plain_layers_around_written_weights(bits, way, calls, monkeypatch):
    """The loss and every gradient, where dense ones compute all rows at a time too."""
    reference = _backend.load("lora_mlp", "reference")
    monkeypatch.setattr(reference, "chunk_rows", lambda rows, _: rows)

    def fused(model, **options):
        torch.manual_seed(2)
        if way == "attach":
            return fastpeft.attach(model, fastpeft.Lora(r=4, init="random", targets="all-linear", **options)).train()
        return fastpeft.accelerate(adapted(model, lora_dropout=0.1), strict=True, **options)

    found, drawn = [], []
    for plain in (False, True):
        model = load(bits=bits)
        for module in list(model.modules()) if plain else ():
            for name, child in module.named_children():
                if quantised.kind_of(child) is not None:
                    dense = nn.Linear(child.in_features, child.out_features, False, dtype=BF16)
                    dense.weight.data = quantised.written(child.train(), BF16)
                    setattr(module, name, dense)
        if plain:
            model.is_loaded_in_4bit = model.is_loaded_in_8bit = model.is_quantized = False
        model, results = fused(model), []
        assert len(mlps(model)) == 2
        trained = [p for p in model.parameters() if p.requires_grad]
        drawn = drawn or [p.detach() for p in trained]  # PEFT draws others around int8
        for parameter, value in zip(trained, drawn, strict=True):
            parameter.data.copy_(value)
        for _ in range(3):
            torch.manual_seed(3)
            loss = model(ids(), labels=ids()).loss
            loss.backward()
            results += [loss.detach(), *(p.grad for p in trained)]
            model.zero_grad()
        found.append(results)
    assert len(calls) == 2 * 3 * 2
    assert all(map(torch.equal, *found))


@each_format
def test_checkpointing_gives_the_same_gradients(bits, calls):
    model = fastpeft.accelerate(adapted(load(bits=bits), lora_dropout=0.1))
    model.enable_input_require_grads()
    found = []
    for on in (False, True):
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(3)
        model(ids(), labels=ids()).loss.backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
    assert len(calls) == 2 + 4
    assert all(map(torch.equal, *found))


def test_few_rows_and_another_dtype_are_the_layers_own(calls):
    """Of 32 rows a quantised layer is called as it is, and where its library computes in another dtype."""
    model = fastpeft.accelerate(adapted(load()))
    mlp, plain = mlps(model)[0], fastpeft.accelerate(adapted(load()), fuse_mlp=False)
    other = plain.base_model.model.model.layers[0].mlp
    _, forward = exact(other)
    for x, fused in (
        (torch.randn(33, 64).to(BF16), True), (torch.randn(32, 64).to(BF16), False), (torch.randn(40, 64), False),
        (torch.randn(4, 9, 64).to(BF16), True),
    ):  # fmt: skip
        for _ in range(2):
            calls.clear()
            y = mlp(x)
            assert bool(calls) == fused
            assert y.dtype == x.dtype
            if fused:
                assert_no_worse(y, other(x), forward(x.double()))
            else:
                assert torch.equal(y, other(x))
    with torch.autocast("cpu", torch.float16):
        calls.clear()
        mlp(torch.randn(40, 64))
        assert not calls


def test_int8_in_evaluation_is_bitsandbytes_own(calls):
    model = fastpeft.accelerate(adapted(load(bits="int8")))
    model(ids())
    assert len(calls) == 2
    model.eval()(ids())
    assert len(calls) == 2
    assert statuses(model) == {"gate_proj: its base layer is called"}
    model.train()(ids())
    assert len(calls) == 4


def test_a_dense_layer_beside_quantised_ones(calls):
    """As where bitsandbytes was told to leave some out."""
    model = load()
    mlp = model.model.layers[0].mlp
    dense = nn.Linear(64, 192, bias=False, dtype=BF16)
    dense.weight.data = quantised.written(mlp.up_proj, BF16)
    wanted = fastpeft.accelerate(adapted(copy.deepcopy(model)))
    mlp.up_proj = dense.requires_grad_(False)
    model = fastpeft.accelerate(adapted(model))
    x = torch.randn(40, 64).to(BF16)
    ys = [m.base_model.model.model.layers[0].mlp(x) for m in (model, wanted)]
    assert len(calls) == 2
    assert torch.equal(*ys)


def test_a_registered_format(calls):
    class Halved(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x, self.weight / 2)

    fastpeft.register_dequantiser(Halved, lambda layer: layer.weight / 2)
    model, wanted = load(), load()
    for each in (model, wanted):
        mlp = each.model.layers[0].mlp
        for name in PROJECTIONS:
            base = getattr(mlp, name)
            layer = (Halved if each is model else nn.Linear)(base.in_features, base.out_features, bias=False)
            layer.weight.data = quantised.written(base, FP32) / (1 if each is model else 2)
            setattr(mlp, name, layer.requires_grad_(False))
    x, found = torch.randn(40, 64), []
    for each in (model, wanted):
        torch.manual_seed(0)
        fastpeft.attach(each, fastpeft.Lora(r=4, init="random", targets=[*PROJECTIONS]))
        found += [each.model.layers[0].mlp(x) for _ in range(3)]
    assert len(calls) == 6
    assert all(torch.equal(y, found[0]) for y in found)
    assert {row.status for row in fastpeft.report(model) if row.kind == "gated MLPs"} == {"fused"}


def test_restored_and_detached():
    model = fastpeft.accelerate(adapted(load()))
    assert len(mlps(model)) == 2
    fastpeft.restore(model)
    assert not mlps(model)
    attached = fastpeft.attach(load(), fastpeft.Lora(r=4))
    assert len(mlps(attached)) == 2
    fastpeft.detach(attached)
    assert not mlps(attached)


def test_a_weight_that_is_replaced_is_seen(calls):
    """After guards were made."""
    model = fastpeft.accelerate(adapted(load()))
    mlp, x = mlps(model)[0], torch.randn(40, 64).to(BF16)
    for _ in range(3):
        before = mlp(x)
    base, donor = mlp.up_proj.base_layer, mlps(model)[1].up_proj.base_layer
    own, donors = copy.copy(base.weight), donor.weight
    quantised.exchange(base, donors)
    after = mlp(x)
    assert not torch.equal(before, after)
    weight = ops.dequantise(quantised.base_of(base))
    assert torch.equal(weight, ops.dequantise(quantised.base_of(donor)))
    assert own is not donors


def test_compiled(calls):
    torch._dynamo.reset()
    model = fastpeft.accelerate(adapted(load()))
    mlp, x = mlps(model)[0], torch.randn(40, 64).to(BF16)
    trained = [p for p in mlp.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(mlp(x).sum(), trained)
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    for one, other in zip(wanted, torch.autograd.grad(compiled(x).sum(), trained), strict=True):
        assert torch.equal(one, other)
