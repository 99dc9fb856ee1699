"""Every method's config in one attach: they act together, switch together, are saved and taken off together."""

import pytest
import torch

import fastpeft
from fastpeft import Bottleneck, Lora, PrefixTuning, PromptTuning, Selective
from tests.support.models import build, close, logits

BITFIT = Selective(params="bias", add_missing_bias=True)
TOGETHER = {
    "prompt and BitFit": (PromptTuning(length=3), BITFIT),
    "LoRA and BitFit": (Lora(r=2), BITFIT),
    "bottleneck and norms": (Bottleneck(), Selective(params="norm")),
    "prefix and LoRA": (PrefixTuning(length=3), Lora(r=2, lora_bias=True)),
    "prompt, LoRA and bottleneck": (PromptTuning(length=3), Lora(r=2), Bottleneck("double_seq_bn")),
}


def move(model):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) / 3)
    return model


def flags(model):
    return {name: (id(parameter), parameter.requires_grad) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("configs", TOGETHER.values(), ids=TOGETHER)
def test_together(family, configs, tmp_path):
    model = build(family)
    with torch.no_grad():
        before, expected = flags(model), logits(model)
    assert fastpeft.attach(model, configs) is model
    move(model)
    logits(model).square().sum().backward()
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all(model.get_parameter(name).grad is not None for name in trained)
    report = fastpeft.report(model)
    assert report.trained == sum(model.get_parameter(name).numel() for name in trained)
    with torch.no_grad():
        moved = logits(model)
        assert moved.shape != expected.shape or not close(moved, expected)
        with fastpeft.disable_adapter(model):
            assert close(logits(model), expected)
        assert torch.equal(logits(model), moved)
        fastpeft.save(model, tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
            {Lora: "lora", Bottleneck: "bottleneck", PromptTuning: "prompt", PrefixTuning: "prefix"}.get(
                type(config), "selective"
            )
            for config in configs
        )
        assert close(logits(fastpeft.load(build(family), tmp_path)), moved)
        fastpeft.set_adapter(model, [])
        assert close(logits(model), expected)
        assert not any(p.requires_grad for p in model.parameters())
        fastpeft.set_adapter(model, "default")
        assert [name for name, p in model.named_parameters() if p.requires_grad] == trained
        assert close(logits(model), moved)
        fastpeft.detach(model)
        assert torch.equal(logits(model), expected)
    assert flags(model) == before


@pytest.mark.parametrize("configs", TOGETHER.values(), ids=TOGETHER)
def test_a_failure_after_the_first_takes_all_back(configs, monkeypatch):
    """Whichever method is applied last fails."""
    from fastpeft.methods.registry import METHODS, method_of

    last = max((method_of("test", config) for config in configs), key=METHODS.index)

    def failing(*args):
        raise MemoryError("no more")

    model = build("llama")
    before, text = flags(model), repr(model)
    monkeypatch.setattr(type(last), "apply", failing)
    with pytest.raises(MemoryError):
        fastpeft.attach(model, list(configs))
    assert flags(model) == before
    assert repr(model) == text
    assert not hasattr(model, "fastpeft_attachment")
    with torch.no_grad():
        assert torch.equal(logits(model), logits(build("llama")))


@torch.no_grad()
def test_biases_are_those_of_the_active_adapter():
    """What LoRA's bias="all" trained acts and trains with its adapter only."""
    model = move(fastpeft.attach(build("bert"), Lora(r=2, bias="all")))
    trained, moved = [name for name, p in model.named_parameters() if p.requires_grad], logits(model)
    fastpeft.attach(model, Bottleneck(), "b")
    assert torch.equal(logits(model), moved)
    fastpeft.set_adapter(model, [])
    assert torch.equal(logits(model), logits(build("bert")))
    assert not any(p.requires_grad for p in model.parameters())
    with fastpeft.disable_adapter(model):
        assert torch.equal(logits(model), logits(build("bert")))
    fastpeft.set_adapter(model, "default")
    assert torch.equal(logits(model), moved)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained


@torch.no_grad()
@pytest.mark.parametrize(
    ("config", "others"),
    [
        (Lora(r=2, bias="all"), [Bottleneck(), BITFIT]),
        (Lora(r=2, targets=["q_proj"], modules_to_save=["mlp", "lm_head"]), [Bottleneck(), Selective(params="norm")]),
    ],
)
def test_lora_is_loaded_beside_others(config, others, tmp_path):
    """What others added to the model is none of LoRA's biases and copies."""
    alone = move(fastpeft.attach(build("llama"), config))
    fastpeft.save(alone, tmp_path)
    model = fastpeft.attach(build("llama"), others)
    fastpeft.load(model, tmp_path, "b")
    fastpeft.set_adapter(model, "b")
    assert torch.equal(logits(model), logits(alone))
    fastpeft.save(model, tmp_path / "again", "b")
    assert torch.equal(logits(fastpeft.load(build("llama"), tmp_path / "again")), logits(alone))
    fastpeft.detach(model)
    assert torch.equal(logits(model), logits(build("llama")))


@torch.no_grad()
def test_a_second_adapter_leaves_what_the_first_trains():
    """LoRA freezes the layers that it wraps, here those whose biases and weights another adapter trains."""
    model = move(fastpeft.attach(build("bert"), Selective(params="bias")))
    moved, trained = logits(model), {id(p) for p in model.parameters() if p.requires_grad}
    fastpeft.attach(model, Lora(r=2), "b")
    assert {id(p) for p in model.parameters() if p.requires_grad} == trained
    assert torch.equal(logits(model), moved)
    fastpeft.set_adapter(model, "b")
    assert not {id(p) for p in model.parameters() if p.requires_grad} & trained
    assert torch.equal(logits(model), logits(build("bert")))
    fastpeft.set_adapter(model, "default")
    assert {id(p) for p in model.parameters() if p.requires_grad} == trained
    assert torch.equal(logits(model), moved)


@torch.no_grad()
def test_what_one_adds_is_none_of_another_s_targets():
    model = fastpeft.attach(build("llama"), PrefixTuning(length=2, projection=8))
    attached = fastpeft.attach(build("llama"), Lora(r=2)).fastpeft_attachment.linears
    fastpeft.attach(model, Lora(r=2), "b")
    assert model.fastpeft_attachment.linears == attached
    seen = []
    fastpeft.attach(
        model, Bottleneck(targets=lambda path, module: seen.append(path) or path == "model.layers.0.mlp"), "c"
    )
    assert not any("fastpeft_" in path or "base_layer" in path for path in seen)
