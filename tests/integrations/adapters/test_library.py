"""Against AdapterHub's own library: checkpoints both ways.

It pins an old transformers, so these tests have an environment of their own: make test-adapters.
"""

import json
import re

import pytest
import torch

import fastpeft
from fastpeft.methods.formats.conversion import convert
from tests.support.adapterhub import ALL, CASES, PRESETS, adapters, bottleneck, build, close, loaded, logits, theirs


@torch.no_grad()
@pytest.mark.parametrize(("name", "form"), CASES)
def test_checkpoints_both_ways(name, form, tmp_path):
    """What the library saved we load, with its outputs; what we then save it loads, from either file of weights."""
    reference = theirs(name, ALL[form]())
    expected = logits(reference)
    assert not close(logits(build(name)), expected)
    reference.save_adapter(str(tmp_path / "theirs"), "a")
    model = fastpeft.load(build(name), tmp_path / "theirs")
    assert close(logits(model), expected)
    fastpeft.save(model, tmp_path / "ours")
    for settings in ({}, {"use_safetensors": True}):
        again = loaded(name, tmp_path / "ours", **settings)
        assert close(logits(again), expected)
        assert again.adapters_config.get("default").to_dict() == reference.adapters_config.get("a").to_dict()
    fastpeft.detach(model)
    assert torch.equal(logits(model), logits(build(name)))


@torch.no_grad()
def test_a_model_with_another_head(tmp_path):
    """AdapterHub's files of a model with a head are read into its base model, and the reverse."""
    theirs("bert", PRESETS["seq_bn"]()).save_adapter(str(tmp_path / "a"), "a")
    whole, base = fastpeft.load(build("bert"), tmp_path / "a"), fastpeft.load(build("bert").bert, tmp_path / "a")
    expected = whole.bert(torch.arange(6).view(2, 3)).last_hidden_state
    assert torch.equal(base(torch.arange(6).view(2, 3)).last_hidden_state, expected)
    fastpeft.save(base, tmp_path / "b")
    assert torch.equal(logits(fastpeft.load(build("bert"), tmp_path / "b")), logits(whole))


def test_presets_are_the_library_s():
    """Every setting of a preset, as its config file has it."""
    pairs = {
        "seq_bn": adapters.SeqBnConfig(),
        "double_seq_bn": adapters.DoubleSeqBnConfig(),
        "par_bn": adapters.ParBnConfig(),
        "scaled_par_bn": adapters.ParBnConfig(scaling="learned"),
        "adapter_plus": adapters.AdapterPlusConfig(stochastic_depth=0.1),
    }
    from fastpeft.methods.formats.adapterhub_format import from_hub

    for preset, config in pairs.items():
        fields = {"config": config.to_dict(), "version": "adapters.1.3.0"}
        ours = fastpeft.Bottleneck(preset)
        read = from_hub("test", fields)
        assert {**read.as_dict(), "preset": preset} == ours.as_dict()


@torch.no_grad()
def test_saved_by_us_first(tmp_path):
    """An adapter that was never theirs, with a width that no whole reduction factor gives."""
    torch.manual_seed(0)
    config = fastpeft.Bottleneck("double_seq_bn", size=5, activation="gelu_tanh", scale="channel", init="houlsby")
    model = fastpeft.attach(build("llama"), config, "mine")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape) / 3)
    fastpeft.save(model, tmp_path, "mine")
    assert close(logits(loaded("llama", tmp_path)), logits(model))


class TestRefused:
    def refused(self, config, folder, message):
        model = build("bert")
        adapters.init(model)
        model.add_adapter("a", config=config)
        model.save_adapter(str(folder), "a")
        plain = build("bert")
        before = repr(plain)
        with pytest.raises(ValueError, match=message):
            fastpeft.load(plain, folder)
        assert repr(plain) == before
        assert all(parameter.requires_grad for parameter in plain.parameters())

    def test_methods(self, tmp_path):
        self.refused(adapters.CompacterConfig(reduction_factor=4), tmp_path, "Compacter is not served by attach")
        self.refused(adapters.SeqBnInvConfig(), tmp_path, "inv_adapter='nice': an invertible adapter is not served")
        self.refused(adapters.LoRAConfig(), tmp_path, "AdapterHub's of a lora adapter, expected a bottleneck adapter")
        self.refused(adapters.PrefixTuningConfig(), tmp_path, "AdapterHub's of a prefix_tuning adapter")
        self.refused(bottleneck(non_linearity="mish"), tmp_path, "non_linearity='mish', expected one of relu")

    def test_fields_of_tomorrow(self, tmp_path):
        theirs("bert", PRESETS["seq_bn"]()).save_adapter(str(tmp_path), "a")
        path = tmp_path / "adapter_config.json"
        fields = json.loads(path.read_text())
        fields["config"]["sideways"] = True
        path.write_text(json.dumps(fields))
        with pytest.raises(ValueError, match="adapter_config.json has sideways=True, which is not served"):
            fastpeft.load(build("bert"), tmp_path)


class TestConvert:
    """What `fastpeft convert` writes, the other library computes."""

    @torch.no_grad()
    @pytest.mark.parametrize("name", ["bert", "llama"])
    def test_lora(self, name, tmp_path):
        model = build(name)
        adapters.init(model)
        model.add_adapter("a", config=adapters.LoRAConfig(r=4, alpha=8, intermediate_lora=True, output_lora=True))
        model.set_active_adapters("a")
        for path, parameter in model.named_parameters():
            if ".loras." in path:
                parameter.add_(torch.randn(parameter.shape) / 3)
        expected = logits(model.eval())
        model.save_adapter(str(tmp_path / "theirs"), "a")
        convert(tmp_path / "theirs", tmp_path / "peft", "peft")
        ours = fastpeft.load(build(name), tmp_path / "peft")
        assert close(logits(ours), expected)
        fastpeft.save(ours, tmp_path / "ours")
        convert(tmp_path / "ours", tmp_path / "hub", "adapters")
        assert close(logits(loaded(name, tmp_path / "hub")), expected)

    @torch.no_grad()
    def test_prompt(self, tmp_path):
        model = build("bert")
        adapters.init(model)
        model.add_adapter("a", config=adapters.PromptTuningConfig(prompt_length=3))
        model.set_active_adapters("a")
        expected = logits(model.eval())
        model.save_adapter(str(tmp_path / "theirs"), "a")
        convert(tmp_path / "theirs", tmp_path / "peft", "peft")
        convert(tmp_path / "peft", tmp_path / "hub", "adapters")
        assert close(logits(loaded("bert", tmp_path / "hub")), expected)

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            (adapters.IA3Config(), "PEFT's LoRA has no form for composition_mode='scale'"),
            (adapters.LoRAConfig(use_gating=True), "no form for use_gating=True"),
            (adapters.PrefixTuningConfig(flat=True), "is AdapterHub's of a prefix_tuning adapter"),
            (adapters.SeqBnConfig(), "PEFT has no form for bottleneck adapters"),
        ],
    )
    def test_what_peft_cannot_say(self, config, message, tmp_path):
        model = build("bert")
        adapters.init(model)
        model.add_adapter("a", config=config)
        model.save_adapter(str(tmp_path / "a"), "a")
        with pytest.raises(ValueError, match=re.escape(message)):
            convert(tmp_path / "a", tmp_path / "b", "peft")
        assert not (tmp_path / "b").exists()
