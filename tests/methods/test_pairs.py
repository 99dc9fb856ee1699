"""Every ordered pair of adapters that overlap: a is attached and trained, then comes b, and neither reads the other.

What a trains in place (parameters of the model's own, copies of its modules, rows, biases that it adds) is no part of
the model that b is attached to. So disabled and detached the model is the base bit for bit, a fresh b is what it is
alone, and each is saved and loaded alone as what it is. What cannot be is refused by name, and nothing is touched.
"""

import copy

import pytest
import torch

import fastpeft
from fastpeft import Bottleneck, Lora, PrefixTuning, PromptTuning, Selective
from tests.support.models import llama, logits
from tests.support.untouched import assert_untouched, snapshot

ADAPTERS = {
    "params": Selective(params=["q_proj.weight", "down_proj.weight", "norm"]),
    "modules": Selective(modules=["layers.1.mlp", "embed_tokens"]),
    "blocks": Selective(layers="last:1"),
    "rows": Selective(rows={"up_proj": [0, 3], "q_proj": [1, -1]}, columns={"layers.1.mlp.down_proj": [2]}),
    "tokens": Selective(tokens=[3, 7]),
    "BitFit": Selective(params="bias"),
    "added": Selective(params="bias", add_missing_bias=True),
    "mixed": Selective(params="norm", tokens=[3, 5], rows={"v_proj": 0.2}, add_missing_bias=True),
    # No two layers that share an input: the order in which they round would depend on which of them are adapted.
    "LoRA": Lora(r=2, targets=["q_proj", "o_proj", "gate_proj", "down_proj"]),
    "q only": Lora(r=2, targets=["q_proj"]),
    "bias all": Lora(r=2, targets=["q_proj", "o_proj"], bias="all"),
    "bias own": Lora(r=2, targets=["q_proj"], bias="lora_only", lora_bias=True),
    "copies": Lora(r=2, targets=["q_proj"], modules_to_save=["layers.1.mlp", "embed_tokens", "model.norm"]),
    "both": (Lora(r=2, targets=["v_proj"], modules_to_save=["lm_head"], bias="all"), Selective(tokens=[3, 4])),
    "bottleneck": Bottleneck(),
    "at up": Bottleneck(targets=["up_proj"]),
    "prompt": PromptTuning(length=2, init="vocabulary"),
    "prefix": PrefixTuning(length=2),
}
BIASES = ("bias all", "bias own", "both")
ONE_BIAS = "trains the model's biases, expected bias='none' with two adapters"
LORA = ("LoRA", "q only", "bias all", "bias own", "copies", "both")
# Why one cannot come after another; all other pairs are served.
REFUSED = {
    **{(a, b): ONE_BIAS for a in LORA for b in LORA if a in BIASES or b in BIASES},
    ("copies", "LoRA"): "targets names model.layers.1.mlp.gate_proj, but another adapter has a copy of it",
    ("LoRA", "copies"): "modules_to_save names model.layers.1.mlp, but model.layers.1.mlp.gate_proj has an adapter",
    ("at up", "copies"): "modules_to_save names model.layers.1.mlp, but an adapter was added to a module inside",
    ("copies", "at up"): "model.layers.1.mlp.up_proj is inside a module of modules_to_save, expected one or the other",
    ("at up", "rows"): "rows names model.layers.0.mlp.up_proj, which is one that has hooks, expected a plain",
}


# The same where embedding and head are one parameter.
TIED = {
    "table": Selective(modules=["embed_tokens"]),
    "head": Selective(modules=["lm_head"]),
    "tokens": Selective(tokens=[3, 7]),
    "copied table": Lora(r=2, targets=["q_proj"], modules_to_save=["embed_tokens"]),
    "copied head": Lora(r=2, targets=["q_proj"], modules_to_save=["lm_head"]),
    "LoRA head": Lora(r=2, targets=["lm_head", "embed_tokens"]),
    "prompt": PromptTuning(length=2, init="vocabulary"),
}
TIED_REFUSED = {
    ("copied table", "LoRA head"): "targets names model.embed_tokens, which is a TrainedCopy",
    ("copied head", "LoRA head"): "targets names lm_head, which is a TrainedCopy",
    ("LoRA head", "copied table"): "modules_to_save names model.embed_tokens, but model.embed_tokens has an adapter",
    ("LoRA head", "copied head"): "modules_to_save names lm_head, but lm_head has an adapter already",
}


@torch.no_grad()
def attach(model, config, name):
    torch.manual_seed(1)
    return fastpeft.attach(model, config, name)


@torch.no_grad()
def move(model, seed):
    """As training would: whatever asks for gradients, and nothing else."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += torch.randn(parameter.shape, generator=generator) / 3


def values(model):
    """Of everything that makes the model what it is; in a copy, since looking must not change anything."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def pair(base, a, b, folder):
    """One cell of the matrix; returns why b is refused, or None."""
    plain = logits(base)
    fresh = logits(attach(copy.deepcopy(base), b, "b"))
    model = copy.deepcopy(base)
    own, modules, before = dict(model.named_parameters()), dict(model.named_modules()), values(model)
    attach(model, a, "a")
    move(model, 2)
    with_a = logits(model)
    fastpeft.save(model, folder / "a", "a")
    untouched = snapshot(model)
    try:
        attach(model, b, "b")
    except (TypeError, ValueError) as error:
        assert_untouched(model, untouched)
        assert torch.equal(logits(model), with_a)
        fastpeft.detach(model)
        assert torch.equal(logits(model), plain)
        return str(error)
    assert torch.equal(logits(model), with_a), "attaching b changed a"
    disabled_is(model, plain)
    fastpeft.set_adapter(model, "b")
    assert torch.equal(logits(model), fresh), "a fresh b depends on a"
    move(model, 3)
    with_b = logits(model)
    disabled_is(model, plain)
    fastpeft.set_adapter(model, "a")
    assert torch.equal(logits(model), with_a), "training b changed a"
    fastpeft.save(model, folder / "b", "b")  # while it does not act
    fastpeft.save(model, folder / "again", "a")
    for name, expected in (("a", with_a), ("b", with_b), ("again", with_a)):
        alone = fastpeft.load(copy.deepcopy(base), folder / name)
        assert torch.equal(logits(alone), expected), f"{name} alone is another"
    loaded = fastpeft.load(fastpeft.load(copy.deepcopy(base), folder / "a", "a"), folder / "b", "b")
    fastpeft.load(loaded, folder / "b", "b")  # into one that does not act
    disabled_is(loaded, plain)
    for name, expected in (("b", with_b), ("a", with_a)):
        fastpeft.set_adapter(loaded, name)
        assert torch.equal(logits(loaded), expected), f"{name} beside the other is another"
        disabled_is(loaded, plain)
    fastpeft.delete_adapter(loaded, "b")
    assert torch.equal(logits(loaded), with_a)
    fastpeft.set_adapter(model, "b")
    fastpeft.delete_adapter(model, "a")
    assert torch.equal(logits(model), with_b), "b is another without a"
    for attached in (model, loaded):
        fastpeft.detach(attached)
        assert torch.equal(logits(attached), plain)
    assert dict(model.named_modules()) == modules
    assert all(parameter is own[name] for name, parameter in model.named_parameters())
    after = values(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    return None


def disabled_is(model, expected):
    with fastpeft.disable_adapter(model):
        assert torch.equal(logits(model), expected), "disabled is not the base"


@torch.no_grad()
@pytest.mark.parametrize("a", ADAPTERS)
def test_every_other_adapter_after_this_one(a, tmp_path, record_property):
    row_of(llama(attention_bias=True), a, ADAPTERS, REFUSED, tmp_path, record_property)


@torch.no_grad()
@pytest.mark.parametrize("a", TIED)
def test_every_other_adapter_of_a_tied_embedding(a, tmp_path, record_property):
    row_of(llama(tied=True), a, TIED, TIED_REFUSED, tmp_path, record_property)


def row_of(base, a, adapters, refused, folder, record_property):
    """A row of the table."""
    cells = []
    for b in adapters:
        why = pair(base, adapters[a], adapters[b], folder / b)
        assert (why is None) == ((a, b) not in refused), f"{b} after {a}: {why}"
        assert why is None or refused[a, b] in why
        cells.append("served" if why is None else "-")
    lines = [[a, *cells]] if list(adapters).index(a) else [["", *adapters], [a, *cells]]
    for line in lines:
        record_property("pairs", "".join(f"{cell:>13}" for cell in line))
