"""Adapters on disk: both ways with the real PEFT."""

import dataclasses
import json
import os

import pytest
import torch
from torch import nn

import fastpeft
from fastpeft import Lora
from fastpeft.methods import adapter_state_dict
from tests.support import models
from tests.support.models import close
from tests.support.saved_net import X, build, trained

safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")


SETTINGS = [
    {},
    {"rslora": True, "alpha": 5, "dropout": 0.3},
    {"rank_pattern": {"q_proj": 2, r"1\.out": 7}, "alpha_pattern": {r"layers\.2\..*": 3}},
    {"targets": ["q_proj", "score"]},
    {"targets": r".*\.(q_proj|out)", "exclude": ["1.out"]},
    {"targets": ["q_proj", "out"], "layers": [0, 2], "layers_pattern": "layers"},
    {"modules_to_save": ["score"]},
    {"modules_to_save": ["score", "norm"], "bias": "all"},
    {"bias": "lora_only", "targets": ["out"]},
    {"bias": "all", "lora_bias": True},
    {"init": "gaussian"},
]


FIELDS = {
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "targets": "target_modules",
    "exclude": "exclude_modules",
    "layers": "layers_to_transform",
    "rslora": "use_rslora",
    "init": "init_lora_weights",
}


@pytest.mark.parametrize("settings", SETTINGS)
def test_round_trip(settings, tmp_path):
    model = trained(**settings)
    fastpeft.save(model, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["adapter_config.json", "adapter_model.safetensors"]
    new = fastpeft.load(build().eval(), tmp_path)
    assert torch.equal(new(X), model(X))
    config, again = (m.fastpeft_attachment.configs["default"] for m in (model, new))
    if settings.get("targets") and not settings.get("layers"):  # else the paths are written
        assert again == dataclasses.replace(config, experts=False)  # of which the file has none
    # Into an adapter that is there, under another name, and once more beside the first.
    other = fastpeft.attach(build(), Lora(**{"r": 4, **settings}), "mine").eval()
    assert not torch.equal(other(X), model(X))
    fastpeft.load(other, tmp_path, "mine")
    assert torch.equal(other(X), model(X))
    fastpeft.detach(new)
    assert torch.equal(new(X), build()(X))


@pytest.mark.oldest
@pytest.mark.parametrize("settings", SETTINGS)
class TestBothWaysWithPeft:
    """PEFT 0.15 loses the biases of bias="lora_only" when it saves; that checkpoint is refused, not half read."""

    def test_peft_reads_ours(self, settings, tmp_path):
        peft = pytest.importorskip("peft", reason="PEFT is not installed")
        model = trained(**settings)
        fastpeft.save(model, tmp_path)
        wrapped = peft.PeftModel.from_pretrained(build(), tmp_path).eval()
        assert close(wrapped(X), model(X))
        ours = {path.removesuffix(".base_layer") for path, m in model.named_modules() if path.endswith(".base_layer")}
        theirs = {
            p.removesuffix(".base_layer")
            for p, _ in wrapped.base_model.model.named_modules()
            if p.endswith("base_layer")
        }
        assert ours == theirs
        with wrapped.disable_adapter(), fastpeft.disable_adapter(model):
            if settings.get("bias", "none") == "none":  # PEFT leaves trained biases in place
                assert close(wrapped(X), model(X))

    def test_we_read_peft_s(self, settings, tmp_path):
        peft = pytest.importorskip("peft", reason="PEFT is not installed")
        if "layers" in settings and tuple(map(int, peft.__version__.split(".")[:2])) < (0, 19):
            pytest.skip("this PEFT finds layers_to_transform only below another module")
        named = {FIELDS.get(name, name): value for name, value in {"targets": "all-linear", **settings}.items()}
        wrapped = peft.get_peft_model(build(), peft.LoraConfig(r=4, **named)).eval()
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) / 4)
        expected = wrapped(X)
        wrapped.save_pretrained(tmp_path)
        saved = safetensors.load_file(tmp_path / "adapter_model.safetensors")
        if settings.get("bias") == "lora_only" and not any(key.endswith("base_layer.bias") for key in saved):
            with pytest.raises(ValueError, match=r"missing layers\.0\.out\.base_layer\.bias"):
                fastpeft.load(build(), tmp_path)
            return
        model = fastpeft.load(build().eval(), tmp_path)
        assert close(model(X), expected)
        # What we then write holds the tensors that PEFT wrote.
        fastpeft.save(model, tmp_path / "again")
        again = safetensors.load_file(tmp_path / "again" / "adapter_model.safetensors")
        kept = {key for key in saved if "original_module" not in key and "modules_to_save" not in key}
        assert again.keys() == kept
        assert all(torch.equal(again[key], saved[key]) for key in kept)


def test_conv1d_both_ways(tmp_path):
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    ids = torch.arange(10).view(2, 5)
    model = fastpeft.attach(models.gpt2(), Lora(r=3, init="random"))
    fastpeft.save(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    wrapped = peft.PeftModel.from_pretrained(models.gpt2(), tmp_path).eval()
    assert close(wrapped(ids).logits, model(ids).logits)
    wrapped.save_pretrained(tmp_path / "theirs")
    assert close(fastpeft.load(models.gpt2(), tmp_path / "theirs")(ids).logits, model(ids).logits)


@pytest.mark.parametrize(("task", "targets"), [("SEQ_CLS", "all-linear"), ("TOKEN_CLS", ["query", "dense"])])
def test_a_classifier_that_peft_saved(task, targets, tmp_path):
    """PEFT names two heads in modules_to_save, of which a model has one."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    make = models.bert if task == "SEQ_CLS" else models.bert_tokens
    config = peft.LoraConfig(task_type=task, r=2, target_modules=targets, init_lora_weights=False)
    wrapped = peft.get_peft_model(make(), config).eval()
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    wrapped.save_pretrained(tmp_path)
    ids = torch.arange(10).view(2, 5)
    assert close(fastpeft.load(make(), tmp_path)(ids).logits, wrapped(ids).logits)


def test_peft_reads_lora_bias_beside_any_init(tmp_path):
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    model = trained(lora_bias=True, init="gaussian")
    fastpeft.save(model, tmp_path)
    assert close(peft.PeftModel.from_pretrained(build(), tmp_path).eval()(X), model(X))


def test_paths_that_are_ends_of_others(tmp_path):
    """PEFT takes the path "0" for the end of "1.0", which is no linear layer."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed")

    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Tanh(), nn.Linear(8, 8)), nn.Linear(8, 2))

    model = fastpeft.attach(net(), Lora(r=2, init="random"))
    fastpeft.save(model, tmp_path)
    assert close(peft.PeftModel.from_pretrained(net(), tmp_path)(X), model(X))
    assert torch.equal(fastpeft.load(net(), tmp_path)(X), model(X))


def test_second_adapter_beside_the_first(tmp_path):
    fastpeft.save(trained(targets=["out"]), tmp_path)
    model = trained(modules_to_save=["score"])
    before = model(X)
    fastpeft.load(model, tmp_path, "b")
    assert torch.equal(model(X), before)
    fastpeft.set_adapter(model, "b")
    assert torch.equal(model(X), trained(targets=["out"])(X))
    fastpeft.save(model, tmp_path / "b", "b")
    assert torch.equal(fastpeft.load(build().eval(), tmp_path / "b")(X), model(X))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype, tmp_path):
    model = fastpeft.attach(build().to(dtype), Lora(r=2, init="random"))
    fastpeft.save(model, tmp_path)
    assert {t.dtype for t in safetensors.load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.float32}
    assert torch.equal(fastpeft.load(build().to(dtype), tmp_path)(X.to(dtype)), model(X.to(dtype)))
    fastpeft.save(fastpeft.attach(build().to(dtype), Lora(r=2, dtype=dtype)), tmp_path)
    assert {t.dtype for t in safetensors.load_file(tmp_path / "adapter_model.safetensors").values()} == {dtype}


def test_state_dict_is_the_model_s():
    model = trained(targets=["q_proj"], lora_bias=True)
    tensors = adapter_state_dict(model)
    names = ("lora_A.weight", "lora_B.weight", "lora_B.bias")
    assert list(tensors) == [f"base_model.model.layers.{i}.q_proj.{name}" for i in range(3) for name in names]
    tensors["base_model.model.layers.0.q_proj.lora_A.weight"].zero_()
    assert not model.layers[0]["q_proj"].adapters["default"].lora_A.any()
