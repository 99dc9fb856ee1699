"""One zoo of adapter folders: inspect, convert, load and a bank give the same verdict, since one function gives it."""

import json
import shutil

import pytest
import torch

import fastpeft
from fastpeft.cli import main
from fastpeft.methods.formats.conversion import convert
from fastpeft.methods.formats.inspection import inspect_checkpoints
from fastpeft.serving import AdapterBank, BadCheckpoint
from tests.support.models import llama
from tests.support.spoiled import ATTENTION, edit, first, pickled, set_to, truncated

peft = pytest.importorskip("peft", reason="PEFT is not installed")
Q = ["q_proj", "v_proj"]
LORA = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "head": {"target_modules": ["lm_head", "embed_tokens"]},
    "random start": {"init_lora_weights": False},
    "gaussian start": {"init_lora_weights": "gaussian"},
    "DoRA": {"use_dora": True},
}
# What each is called wherever it is refused, and by whom: a bank serves LoRA alone, load what has a method.
OTHERS = {
    "PiSSA": (lambda: lora(init_lora_weights="pissa"), "path_initial_model_for_weight_conversion", "load bank"),
    "OLoRA": (lambda: lora(init_lora_weights="olora"), "which changes the frozen weights; PEFT's save", "load bank"),
    "trained biases": (lambda: lora(bias="all"), "bias", "bank"),
    "copies": (lambda: lora(modules_to_save=["norm"]), "modules_to_save", "bank"),
    "token rows beside": (lambda: lora(trainable_token_indices=[3]), "trainable_token_indices", "bank"),
    "prompt": (lambda: causal(peft.PromptTuningConfig), "is prompt tuning, which a bank does not serve", "bank"),
    "prefix": (lambda: causal(peft.PrefixTuningConfig), "is prefix tuning, which a bank does not serve", "bank"),
    "p-tuning": (
        lambda: causal(peft.PromptEncoderConfig, encoder_hidden_size=8),
        "is PEFT's P_TUNING: peft_type='P_TUNING' is not served",
        "load bank",
    ),
    "token rows": (lambda: peft.TrainableTokensConfig(token_indices=[3]), "is token rows, which a bank", "bank"),
    "norms": (lambda: peft.LNTuningConfig(target_modules=["norm"]), "is normalisation layers, which a bank", "bank"),
    "VeRA": (
        lambda: peft.VeraConfig(r=4, target_modules=["o_proj"]),
        "is PEFT's VERA: peft_type='VERA' is not served",
        "load bank",
    ),
    "LoHa": (lambda: peft.LoHaConfig(r=2, target_modules=Q), "is PEFT's LOHA: peft_type='LOHA' is not", "load bank"),
    "LoKr": (lambda: peft.LoKrConfig(r=2, target_modules=Q), "is PEFT's LOKR: peft_type='LOKR' is not", "load bank"),
    "OFT": (lambda: peft.OFTConfig(oft_block_size=4, target_modules=Q), "is PEFT's OFT: peft_type=", "load bank"),
    "IA3": (lambda: peft.IA3Config(target_modules=Q, feedforward_modules=[]), "is PEFT's IA3: peft_type", "load bank"),
    "AdaLoRA": (
        lambda: peft.AdaLoraConfig(target_modules=Q, total_step=9, tinit=1, tfinal=1),
        "is PEFT's ADALORA: peft_type='ADALORA' is not served",
        "load bank",
    ),
}
OWN = {
    "bottleneck": (lambda: fastpeft.Bottleneck(size=3), "AdapterHub's bottleneck adapters, which a bank"),
    "bottleneck by rule": (
        lambda: fastpeft.Bottleneck(size=3, targets=["mlp"]),
        "is bottleneck adapters, which a bank",
    ),
    "selection": (lambda: fastpeft.Selective(rows={"up_proj": [1]}), "is a selection, which a bank does not serve"),
}


def nothing_of(folder, word):
    edit(folder, lambda tensors: [tensors.pop(key) for key in list(tensors) if word in key])


FAULTS = {
    "truncated": (truncated, "truncated or no safetensors file"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
    "no tensors": (lambda f: edit(f, dict.clear), "has no tensors"),
    "no fields": (lambda f: (f / "adapter_config.json").write_text("{}"), "is neither PEFT's"),
    "a list": (lambda f: (f / "adapter_config.json").write_text("[]"), "is neither PEFT's"),
    "half of the pairs": (lambda f: nothing_of(f, "lora_B"), "has no lora_B beside its lora_A"),
    "the other half": (lambda f: nothing_of(f, "0.self_attn.q_proj.lora_A"), "has no lora_A beside its lora_B"),
    "NaN": (lambda f: edit(f, first("q_proj.lora_A.weight", float("nan"))), "has values that are not finite"),
    "infinity": (lambda f: edit(f, first("v_proj.lora_B.weight", float("-inf"))), "has values that are not finite"),
    "another rank": (lambda f: edit(f, config={"r": 8}), "is not of rank 8, which the config says"),
    "one other rank": (lambda f: edit(f, set_to("v_proj.lora_B.weight", torch.ones(16, 3))), "is not of rank 4"),
    "three dimensions": (lambda f: edit(f, set_to("v_proj.lora_B.weight", torch.ones(16, 4, 1))), "is not of rank 4"),
    "integers": (lambda f: edit(f, set_to("q_proj.lora_A.weight", torch.ones(4, 32).int())), "expected floating point"),
    "extra key": (lambda f: edit(f, set_to("q_proj.something", torch.ones(4))), "is no part of LoRA"),
    "without prefix": (lambda f: edit(f, lambda t: t.update(x=torch.ones(1))), "expected keys that start with"),
    "rank 0": (lambda f: edit(f, config={"r": 0}), "r is 0"),
    "rank no number": (lambda f: edit(f, config={"r": "4"}), "r is '4'"),
    "alpha NaN": (lambda f: edit(f, config={"lora_alpha": float("nan")}), "alpha is nan"),
    "no targets": (lambda f: edit(f, config={"target_modules": None}), "is no LoRA config"),
    "a bad pattern": (lambda f: edit(f, config={"target_modules": "((("}), "targets is"),
}


def lora(**settings):
    return peft.LoraConfig(**{"r": 4, "target_modules": Q, **settings})


def causal(kind, **settings):
    return kind(task_type="CAUSAL_LM", num_virtual_tokens=3, **settings)


def written(config, folder):
    torch.manual_seed(2)
    wrapped = peft.get_peft_model(llama(), config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad and "_proj" in name:
                parameter.add_(torch.randn(parameter.shape) / 8)
    wrapped.save_pretrained(folder)
    return folder


def verdicts(folder):
    """What each of the four says against the folder, or None."""
    (found,) = inspect_checkpoints(folder)
    said = {"inspect": "\n".join(found.problems) or None}
    assert main(["inspect", str(folder)]) == (1 if found.problems else 0)
    calls = {
        "load": lambda: fastpeft.load(llama(), folder),
        "bank": lambda: _banked(folder),
        "convert": lambda: convert(folder, folder.parent / "converted", "fastpeft"),
    }
    for name, call in calls.items():
        try:
            call()
            said[name] = None
        except (ValueError, FileNotFoundError) as error:
            said[name] = str(error)
    assert (said["convert"] is None) == (folder.parent / "converted").exists()
    return said


def _banked(folder):
    with AdapterBank(llama(), slots=1, max_rank=16) as bank:
        bank.load("x", folder)


@pytest.mark.parametrize("name", LORA)
def test_what_is_whole(name, tmp_path):
    assert set(verdicts(written(lora(**LORA[name]), tmp_path / "a")).values()) == {None}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_served_is_named_as_what_it_is(name, tmp_path):
    make, words, refusing = OTHERS[name]
    said = verdicts(written(make(), tmp_path / "a"))
    for who in ("load", "bank"):
        assert (said[who] is not None) == (who in refusing), said
        assert said[who] is None or words in said[who]
    unserved = "load" in refusing  # then nothing here computes it, and inspect and convert say it in the same words
    for who in ("inspect", "convert"):
        assert (said[who] is not None) == unserved
        assert not unserved or words in said[who]


@pytest.mark.parametrize("name", OWN)
def test_formats_of_our_own_and_adapterhubs(name, tmp_path):
    make, words = OWN[name]
    fastpeft.save(fastpeft.attach(llama(), make()), tmp_path / "a")
    said = verdicts(tmp_path / "a")
    assert words in said.pop("bank")
    if name != "bottleneck":  # which convert writes in AdapterHub's format; the other two are ours already
        assert said == {"inspect": None, "load": None, "convert": None}


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_broken(name, tmp_path):
    spoil, words = FAULTS[name]
    spoil(written(lora(), tmp_path / "a"))
    said = verdicts(tmp_path / "a")
    assert all(text is not None and words in text for text in said.values()), said


def test_pickles_are_for_convert(tmp_path):
    pickled(written(lora(), tmp_path / "a"))
    said = verdicts(tmp_path / "a")
    assert "truncated or holds more than tensors" in said["inspect"]
    assert "truncated or holds more than tensors" in said["convert"]
    assert all(
        "would be unpickled, expected adapter_model.safetensors, which fastpeft convert" in said[w]
        for w in ("load", "bank")
    )


def test_another_base_model_is_a_warning(tmp_path):
    folder = written(lora(), tmp_path / "a")
    edit(folder, config={"base_model_name_or_path": "org/other"})
    model = llama()
    model.name_or_path = "org/this"
    with pytest.warns(UserWarning, match="load: the checkpoint is for org/other, the model is org/this"):
        fastpeft.load(model, folder)
    fastpeft.detach(model)
    with (
        AdapterBank(model, slots=1, max_rank=16) as bank,
        pytest.warns(UserWarning, match="for org/other, the model is"),
    ):
        bank.load("x", folder)


def test_the_same_verdict_of_a_state_dict(tmp_path):
    """A bank that is given tensors and fields instead of a folder."""
    from safetensors.torch import load_file

    folder = written(lora(), tmp_path / "a")
    tensors = load_file(folder / "adapter_model.safetensors")
    fields = json.loads((folder / "adapter_config.json").read_text())
    shutil.rmtree(folder)
    del tensors[f"{ATTENTION}.q_proj.lora_B.weight"]
    with AdapterBank(llama(), slots=1, max_rank=16) as bank:
        with pytest.raises(BadCheckpoint, match="q_proj has no lora_B beside its lora_A"):
            bank.load("x", tensors, config=fields)
        with pytest.raises(BadCheckpoint, match="is PEFT's VERA"):
            bank.load("x", tensors, config={**fields, "peft_type": "VERA"})
