"""PEFT's layers around quantised bases: fused, as accurate as PEFT's own, saved, merged and trained as PEFT does it."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import fastpeft
from fastpeft import ops
from fastpeft.nn import quantised
from fastpeft.testing import assert_no_worse
from tests.support.quantised_models import FORMATS, ids, load

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64


def adapted(model, **settings):
    torch.manual_seed(1)
    settings = {"r": 8, "target_modules": "all-linear", "init_lora_weights": False, **settings}
    return get_peft_model(model, LoraConfig(**settings))


def statuses(model):
    return {row.status for row in fastpeft.report(model).layers if row.kind == "LoRA layers"}


def gradients(model, x):
    model.zero_grad()
    model(x, labels=x).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def one_layer(bits, k=64, n=96, dtype=BF16, bias=True):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    torch.manual_seed(0)
    linear = nn.Linear(k, n, bias).to(dtype)
    if bits == "int8":
        base = bnb.nn.Linear8bitLt(k, n, bias, has_fp16_weights=False)
    else:
        kind, _, nested = bits.partition(" ")
        base = bnb.nn.Linear4bit(k, n, bias, dtype, compress_statistics=bool(nested), quant_type=kind)
    base.load_state_dict(linear.state_dict())
    return base.to("cpu").requires_grad_(False)


class OneLayer(nn.Module):
    def __init__(self, base, dtype=BF16):
        super().__init__()
        self.base = base.to(dtype) if type(base) is nn.Linear else base

    def forward(self, x):
        return self.base(x)


def around(base, **settings):
    settings = {"r": 8, "target_modules": ["base"], "init_lora_weights": False, **settings}
    torch.manual_seed(1)
    return get_peft_model(OneLayer(base), LoraConfig(**settings)).train()


@pytest.mark.parametrize("bits", FORMATS)
@pytest.mark.parametrize("rows", [40, 5])  # fewer than those of which the base is called as it is
def test_no_less_accurate_than_peft(bits, rows):
    """The weight as its library writes it out is the truth, in float64."""
    model = around(one_layer(bits))
    layer = model.base_model.model.base
    x, dy = torch.randn(rows, 64).to(BF16), torch.randn(rows, 96).to(BF16)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    weight = ops.dequantise(quantised.base_of(layer.base_layer), FP32)

    def computed(call, x, leaves, dy):
        x = x.clone().requires_grad_()
        y = call(x)
        return y.detach(), *torch.autograd.grad(y, [x, *leaves], dy)

    def exact(x):
        low = x @ leaves[0].T @ leaves[1].T * layer.scaling["default"]
        return x @ weight.double().T + layer.base_layer.bias.double() + low

    leaves = [t.detach().double().requires_grad_() for t in (a, b)]
    truth = computed(exact, x.double(), leaves, dy.double())
    theirs = computed(model, x, [a, b], dy)
    fastpeft.accelerate(model, strict=True)
    assert statuses(model) == {"fused"}
    for _ in range(3):
        for name, one, other, right in zip(
            ("y", "dx", "dA", "dB"), computed(model, x, [a, b], dy), theirs, truth, strict=True
        ):
            assert one.dtype == other.dtype
            assert_no_worse(one, other, right, name)


@pytest.mark.parametrize("bits", FORMATS)
def test_only_x_and_s_are_kept(bits):
    model = fastpeft.accelerate(around(one_layer(bits), lora_dropout=0.1))
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    layer = model.base_model.model.base.base_layer
    known |= {part.untyped_storage().data_ptr() for part in quantised.base_of(layer)[:6]}
    x, kept = torch.randn(128, 64).to(BF16).requires_grad_(), {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in known:
            kept[tensor.untyped_storage().data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    assert y.requires_grad
    assert sum(kept.values()) == x.nbytes + 128 * 8 * 4 + 8  # x, S in float32, the seed


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("bits", FORMATS)
def test_models_train_as_with_peft(family, bits):
    model = adapted(load(family, bits), lora_dropout=0.0).train()
    x = ids()
    wanted, logits = gradients(model, x), model(x).logits.detach()
    fastpeft.accelerate(model, strict=True)
    assert statuses(model) == {"fused"}
    rounding = 8 * torch.finfo(BF16).eps  # of two layers and a head in bfloat16, in each of the two
    for _ in range(3):
        found = gradients(model, x)
        assert ((model(x).logits - logits).norm() / logits.norm()) < rounding
        assert found.keys() == wanted.keys()
        assert all((found[n] - wanted[n]).norm() <= rounding * wanted[n].norm() + 1e-6 for n in wanted)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    again = gradients(model, x)
    assert all(torch.equal(found[name], again[name]) for name in found)
    fastpeft.restore(model)
    assert {type(m).__module__ for m in model.modules() if hasattr(m, "lora_A")} == {"peft.tuners.lora.bnb"}


def test_saved_and_loaded_both_ways(tmp_path):
    x, model = ids(), adapted(load())
    fastpeft.accelerate(model)
    model.save_pretrained(tmp_path / "ours")
    theirs = PeftModel.from_pretrained(load(), tmp_path / "ours").train()
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = fastpeft.accelerate(PeftModel.from_pretrained(load(), tmp_path / "theirs"), strict=True).train()
    assert torch.equal(model.train()(x).logits, loaded(x).logits)


def test_copied_and_pickled():
    model = fastpeft.accelerate(around(one_layer("nf4")))
    x = torch.randn(40, 64).to(BF16)
    wanted = model(x)
    assert torch.equal(copy.deepcopy(model)(x), wanted)
    layer = model.base_model.model.base
    assert pickle.loads(pickle.dumps(type(layer))) is type(layer)


def test_merged_with_pefts_rounding():
    model = adapted(load())
    ours = fastpeft.accelerate(copy.deepcopy(model))
    for each in (model, ours):
        each.merge_adapter()
    assert statuses(ours) == {"its adapters are merged into the base layer"}
    one, other = ([p.data for n, p in m.named_parameters() if "base_layer" in n] for m in (model, ours))
    assert one
    assert all(map(torch.equal, one, other))


def test_registered_layers():
    config = fastpeft.register(LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False))
    model = get_peft_model(load(), config)
    assert statuses(model) == {"fused"}
    base = one_layer("nf4")
    plain = get_peft_model(OneLayer(base), fastpeft.register(LoraConfig(r=8, target_modules=["base"])))
    assert statuses(plain) == {"fused"}  # lora.Linear, as the model does not say that it was loaded in 4 bits


def test_another_dtype_than_the_bases():
    """Its library computes in bfloat16 and gives float32 back; the base is called, the term added in float32."""
    model = around(one_layer("nf4"))
    x = torch.randn(40, 64)
    wanted = model(x)
    found = fastpeft.accelerate(model)(x)
    assert found.dtype == wanted.dtype == FP32
    torch.testing.assert_close(found, wanted)


def test_a_weight_repacked_for_evaluation_is_called():
    model = around(one_layer("nf4"))
    fastpeft.accelerate(model)
    state = model.base_model.model.base.base_layer.weight.quant_state
    state.packing_format_for_cpu = True
    (status,) = statuses(model)
    assert status.startswith("fused beside its base: ")
    assert "repacked" in status


def test_what_is_quantised_anew_is_read_anew():
    model = fastpeft.accelerate(around(one_layer("nf4")))
    x = torch.randn(40, 64).to(BF16)
    for _ in range(3):
        before = model(x)
    layer, other = model.base_model.model.base.base_layer, one_layer("nf4 nested", bias=False)
    layer.weight = other.weight
    assert not torch.equal(model(x), before)
    weight = ops.dequantise(quantised.base_of(layer))
    fused = fastpeft.restore(model)(x)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, layer.bias), rtol=0.02, atol=0.02)
    assert fused.shape == before.shape


def test_offloaded():
    model = fastpeft.accelerate(around(one_layer("nf4")))
    layer = model.base_model.model.base.base_layer
    layer._parameters["weight"] = layer.weight.to("meta")
    assert "meta device" in statuses(model).pop()


@pytest.mark.parametrize("bits", ["nf4", "nf4 nested", "int8"])
def test_compiled_without_a_break(bits):
    torch._dynamo.reset()
    model, x = fastpeft.accelerate(around(one_layer(bits))), torch.randn(64, 64).to(BF16)
    trained = [p for p in model.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(model(x).sum(), trained)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for one, other in zip(wanted, torch.autograd.grad(compiled(x).sum(), trained), strict=True):
        assert torch.equal(one, other)
