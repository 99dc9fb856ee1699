"""attach(Lora) on models in 4 and 8 bits: trained, saved, loaded, merged; and around subclasses of nn.Linear."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import fastpeft
from fastpeft.nn import LoraLinear, quantised
from tests.support.quantised_models import FORMATS, ids, load

BF16 = torch.bfloat16


def statuses(model):
    return {row.status for row in fastpeft.report(model).layers if row.kind == "LoRA layers"}


def gradients(model, x):
    model.zero_grad()
    model(x, labels=x).loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("bits", FORMATS)
def test_trains_as_peft_does(family, bits, tmp_path):
    model = load(family, bits)
    torch.manual_seed(0)
    theirs = get_peft_model(copy.deepcopy(model), LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False))
    theirs.save_pretrained(tmp_path)
    fastpeft.load(model, tmp_path, is_trainable=True)
    assert statuses(model.train()) == {"fused"}
    x, rounding = ids(), 8 * torch.finfo(BF16).eps
    wanted, logits = gradients(theirs.train(), x), theirs(x).logits
    for _ in range(3):
        assert (model(x).logits - logits).norm() < rounding * logits.norm()
        for one, other in zip(gradients(model, x), wanted, strict=True):
            assert (one - other).norm() <= rounding * other.norm() + 1e-6


def test_saved_for_peft(tmp_path):
    model, x = load(), ids()
    fastpeft.attach(model, fastpeft.Lora(r=4, targets="all-linear", init="random"))
    fastpeft.save(model, tmp_path)
    theirs = PeftModel.from_pretrained(load(), tmp_path)
    with torch.no_grad():
        one, other = model.train()(x).logits, theirs.train()(x).logits
    assert (one - other).norm() < 8 * torch.finfo(BF16).eps * other.norm()
    base = load().train()
    fastpeft.detach(model)
    assert torch.equal(model(x).logits, base(x).logits)
    assert type(model.hf_quantizer) is type(base.hf_quantizer)


@pytest.mark.parametrize("bits", FORMATS)
def test_merged_with_pefts_rounding_and_back(bits, tmp_path):
    model, x = load(bits=bits), ids()
    fastpeft.attach(model, fastpeft.Lora(r=4, targets=["q_proj", "down_proj"], init="random"))
    fastpeft.save(model, tmp_path)
    theirs = PeftModel.from_pretrained(load(bits=bits), tmp_path)
    with torch.no_grad():
        before = model.train()(x).logits
        fastpeft.merge(model)
        theirs.merge_adapter()
        layers = [m.model.layers[1].mlp.down_proj.base_layer for m in (model, theirs.base_model.model)]
        one, other = (layer.weight.data for layer in layers)
        assert torch.equal(one, other)
        assert (model(x).logits - before).norm() < 0.5 * before.norm()
        fastpeft.unmerge(model)
        assert torch.equal(model(x).logits, before)


@pytest.mark.parametrize("bits", FORMATS)
def test_merged_into_weights_that_are_written_out_and_back(bits):
    model, x = load(bits=bits).train(), ids()
    fastpeft.attach(model, fastpeft.Lora(r=4, targets="all-linear", init="random"))
    layer = model.model.layers[0].mlp.down_proj
    base, weight = layer.base_layer, quantised.written(layer.base_layer) + layer.delta("default")[0]
    with torch.no_grad():
        before = model(x).logits
        fastpeft.merge(model, dequantise=True)
        assert type(layer.base_layer) is nn.Linear
        assert torch.equal(layer.base_layer.weight, weight.to(BF16))
        assert not layer.base_layer.weight.requires_grad
        assert statuses(model) == {"merged into a weight that was written out"}
        after = model(x).logits
        assert (after - before).norm() < 8 * torch.finfo(BF16).eps * before.norm()
        with fastpeft.disable_adapter(model):
            assert layer.base_layer is base
        assert torch.equal(model(x).logits, after)
        with pytest.raises(ValueError, match="merged"):
            fastpeft.save(model, "nowhere")
        fastpeft.unmerge(model)
        assert layer.base_layer is base
        assert torch.equal(model(x).logits, before)


def test_what_was_written_out_is_saved_as_a_model_that_never_was_quantised(tmp_path):
    model, x = load(), ids()
    fastpeft.attach(model, fastpeft.Lora(r=4, targets="all-linear", init="random"))
    fastpeft.merge(model, dequantise=True)
    logits = model(x).logits
    model.save_pretrained(tmp_path / "merged")
    assert model.is_quantized
    fastpeft.unmerge(model)
    fastpeft.merge(model, dequantise=True)
    fastpeft.detach(model, keep_merged=True)
    assert not model.is_quantized
    model.save_pretrained(tmp_path / "detached")
    for folder in ("merged", "detached"):
        loaded = type(model).from_pretrained(tmp_path / folder, dtype=BF16)
        assert type(loaded.model.layers[0].mlp.up_proj) is nn.Linear
        assert torch.equal(loaded(x).logits, logits)


def test_some_layers_written_out_are_no_model_that_can_be_saved(tmp_path):
    model = load()
    fastpeft.attach(model, fastpeft.Lora(r=4, targets=["q_proj"], init="random"))
    with pytest.raises(TypeError, match="^merge: dequantise is 1"):
        fastpeft.merge(model, dequantise=1)
    fastpeft.merge(model, dequantise=True)
    with pytest.raises(ValueError, match="k_proj is quantised, expected to be written out"):
        model.save_pretrained(tmp_path)
    assert model.is_quantized
    fastpeft.detach(model, keep_merged=True)
    assert model.is_quantized


def test_few_rows_and_several_adapters():
    model, x = load(), ids(1, 5)
    fastpeft.attach(model, fastpeft.Lora(r=4, targets="all-linear", init="random"), name="one")
    fastpeft.attach(model, fastpeft.Lora(r=4, targets="all-linear", init="random"), name="two")
    fastpeft.set_adapter(model, ["one", "two"])
    with torch.no_grad():
        few, many = model.train()(x).logits, model(x.expand(16, -1)).logits[:1]
    assert (few - many).norm() < 8 * torch.finfo(BF16).eps * few.norm()


class Doubled(nn.Linear):
    """Adds the bias twice, as nobody who reads weight and bias would know."""

    def forward(self, x):
        return super().forward(x) + self.bias


def test_a_subclass_of_linear_is_called():
    torch.manual_seed(0)
    base = Doubled(12, 7)
    layer = LoraLinear(copy.deepcopy(base), init="random")
    assert layer.fastpeft_report() == "fused beside its base: it is a Doubled"
    x = torch.randn(5, 12)
    torch.testing.assert_close(layer(x), base(x) + x @ layer.delta("default")[0].T)


def test_a_layer_that_is_quantised_anew():
    model, x = load(), ids()
    fastpeft.attach(model, fastpeft.Lora(r=4, targets=["q_proj"], init="random"))
    model.train()
    for _ in range(3):
        before = model(x).logits
    layer, other = (m.model.layers[0].self_attn.q_proj for m in (model, load(bits="nf4 nested")))
    layer.base_layer.weight = other.weight
    assert not torch.equal(model(x).logits, before)
    assert quantised.base_of(layer.base_layer).absmax.dtype == torch.uint8
