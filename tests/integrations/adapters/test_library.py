"""Against AdapterHub's own library: checkpoints both ways, and its layers served by the fused op.

It pins an old transformers, so these tests have an environment of their own: make test-adapters.
"""

import copy
import json
import pickle
import re

import pytest
import torch

import fastpeft
from fastpeft.methods.formats.conversion import convert
from tests.support.adapterhub import (
    FAMILIES,
    FORMS,
    IMPOSSIBLE,
    PRESETS,
    adapters,
    bottleneck,
    build,
    close,
    logits,
    theirs,
)

CASES = [
    (model, form) for model in FAMILIES for form in [*PRESETS, *FORMS] if (model, form) not in IMPOSSIBLE
]  # fmt: skip
ALL = {**PRESETS, **FORMS}


def loaded(name, folder, **settings):
    """The library's model with the adapter from a folder active."""
    model = build(name)
    adapters.init(model)
    adapter = model.load_adapter(str(folder), **settings)
    model.set_active_adapters(adapter)
    return model.eval()


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


def gradients(model):
    model.zero_grad()
    loss = logits(model)
    loss.square().sum().backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class TestAccelerate:
    @pytest.mark.parametrize(("name", "form"), [case for case in CASES if case[0] in ("bert", "llama", "t5")])
    def test_same_model(self, name, form):
        model = theirs(name, ALL[form]())
        text, keys, classes = repr(model), list(model.state_dict()), [type(m) for m in model.modules()]
        expected, wanted = gradients(model)
        assert fastpeft.accelerate(model) is model
        assert (repr(model), list(model.state_dict())) == (text, keys)
        report = fastpeft.report(model)
        assert {row.kind for row in report} == {"bottleneck adapters"}
        after = any(word in form for word in ("gate", "norms", "norm after the", "its own"))
        assert all(("plain PyTorch after the fused op" in row.status) if after else row.fused for row in report)
        assert {row.backend for row in report} == ({None} if after else {"reference"})
        actual, found = gradients(model)
        assert close(actual, expected)
        assert found.keys() == wanted.keys()
        largest = max(gradient.abs().max() for gradient in wanted.values())
        for key, gradient in wanted.items():
            assert (found[key] - gradient).abs().max() <= 2**10 * torch.finfo(torch.float32).eps * largest
        fastpeft.accelerate(model, strict=True)
        assert fastpeft.restore(model) is model
        assert [type(m) for m in model.modules()] == classes
        assert torch.equal(gradients(model)[0], expected)

    def test_saves_what_it_did(self, tmp_path):
        model = fastpeft.accelerate(theirs("bert", PRESETS["seq_bn"]()))
        model.save_adapter(str(tmp_path), "a")
        assert close(logits(loaded("bert", tmp_path)), logits(model))
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model.bert.encoder.layer[0].output.adapters))):
            assert "FastAdapter" in {type(m).__name__ for m in other.modules()}

    @pytest.mark.parametrize(
        ("config", "reason"),
        [
            (adapters.CompacterConfig(reduction_factor=4), "its projections are PHMLayer and PHMLayer (Compacter)"),
            (adapters.SeqBnInvConfig(), "NICECouplingBlock has no fused form"),
            (bottleneck(non_linearity="mish"), "activation Mish"),
        ],
    )
    def test_what_is_not_fused(self, config, reason):
        model = theirs("bert", config)
        expected = logits(model)
        classes = [type(m) for m in model.modules()]
        with pytest.raises(ValueError, match="accelerate: strict, but") as caught:
            fastpeft.accelerate(model, strict=True)
        assert [type(m) for m in model.modules()] == classes
        assert reason in str(caught.value)
        fastpeft.accelerate(model)
        assert any(row.status.startswith(reason) for row in fastpeft.report(model))
        assert close(logits(model), expected)

    def test_before_accelerate_the_report_says_so(self):
        report = fastpeft.report(theirs("bert", PRESETS["seq_bn"]()))
        assert len(report) == 2
        assert "Adapter is the adapters library's own layer; fastpeft.accelerate has not been called" in str(report)

    @pytest.mark.parametrize(
        "setup",
        [
            adapters.composition.Stack("a", "b"),
            adapters.composition.Average("a", "b"),
            adapters.composition.Average("a", "b", weights=[0.3, 0.7]),
            adapters.composition.BatchSplit("a", "b", batch_sizes=[1, 1]),
            adapters.composition.Split("a", "b", splits=[2, 3]),
            adapters.composition.Parallel("a", "b"),
            adapters.composition.Stack("a", adapters.composition.Parallel("b", "c")),
            adapters.composition.Fuse("a", "b"),
        ],
        ids=str,
    )
    def test_compositions(self, setup):
        model = build("bert")
        adapters.init(model)
        torch.manual_seed(3)
        for name in "abc":
            model.add_adapter(name, config=bottleneck(init_weights="mam_adapter"))
        if isinstance(setup, adapters.composition.Fuse):
            model.add_adapter_fusion(setup)
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                if "adapter" in path:
                    parameter.add_(torch.randn(parameter.shape) / 5)
        model.set_active_adapters(setup)
        model.eval()
        expected = logits(model)
        fastpeft.accelerate(model)
        assert close(logits(model), expected)
        rows = [row for row in fastpeft.report(model) if ".adapters." in row.path]
        if isinstance(setup, adapters.composition.Fuse):
            assert {row.status for row in rows} == {"AdapterFusion reads its projection"}
            assert any(row.status == "BertFusion has no fused form" for row in fastpeft.report(model))
            with pytest.raises(ValueError, match="strict"):
                fastpeft.accelerate(model, strict=True)
        else:
            assert all(row.fused for row in rows)

    def test_dropout_and_stochastic_depth(self):
        model = theirs("llama", bottleneck(dropout=0.4))
        expected = logits(model)
        fastpeft.accelerate(model).train()
        torch.manual_seed(1)
        first = logits(model)
        torch.manual_seed(1)
        assert torch.equal(logits(model), first)
        assert not close(first, expected)
        assert close(logits(model.eval()), expected)

    def test_bad_models(self):
        with pytest.raises(ValueError, match="no bottleneck adapter of the adapters library|no LoRA layer"):
            fastpeft.accelerate(build("bert"))
        plain = build("bert")
        adapters.init(plain)
        with pytest.raises(ValueError, match="no LoRA layer"):
            fastpeft.restore(plain)


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
            (adapters.PrefixTuningConfig(flat=True), "PEFT has no form for what AdapterHub calls prefix_tuning"),
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
