"""A bias of B in a bank: each row of a mixed batch is what PEFT gives it alone; slots are given to others."""

import copy

import pytest
import torch

from fastpeft.serving import AdapterBank, BadCheckpoint, Batcher

pytest.importorskip("peft", reason="PEFT is not installed")
import peft

from tests.support.models import build, llama, prompts
from tests.support.spoiled import edit

SETTINGS = {
    "plain": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
    "biased": {"r": 4, "target_modules": ["q_proj", "k_proj", "down_proj"], "lora_bias": True},
    "dora": {"r": 4, "target_modules": ["q_proj", "o_proj"], "use_dora": True},
    "other": {"r": 6, "use_rslora": True, "target_modules": ["q_proj", "up_proj"], "lora_bias": True},
}
MIXED = ["biased", None, "other", "plain", "dora", "biased"]


def folders_of(model, root):
    for i, (name, settings) in enumerate(SETTINGS.items()):
        torch.manual_seed(1000 + i)
        adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(lora_alpha=8, **settings))
        for key, parameter in adapted.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(parameter, mean=float("magnitude" in key), std=0.2)
        adapted.save_pretrained(root / name)
    return {name: root / name for name in SETTINGS}


@torch.no_grad()
def alone(model, folder, x):
    if folder is None:
        return copy.deepcopy(model)(x).logits
    return peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()(x).logits


@pytest.mark.parametrize("family", ["llama", "qwen2"])  # without biases of the model's own, and with some
@torch.no_grad()
def test_rows_of_a_mixed_batch_are_pefts(tmp_path, family):
    model, x = build(family).eval(), prompts(len(MIXED))
    folders = folders_of(model, tmp_path)
    wanted = torch.cat([alone(model, folders.get(name), x[i : i + 1]) for i, name in enumerate(MIXED)])
    bare = model(x).logits
    with AdapterBank(model, slots=4, max_rank=8) as bank:
        for name, folder in folders.items():
            bank.load(name, folder)
        with bank.use(MIXED):
            logits = model(x).logits
        torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
        assert torch.equal(logits[1], bare[1])
    assert torch.equal(model(x).logits, bare)


@torch.no_grad()
def test_a_slot_is_given_to_others(tmp_path):
    """LoRA in a slot that had a bias, alone and beside an adapter that has one: as if nobody had been there."""
    model, x = llama(), prompts(2)
    folders = folders_of(model, tmp_path)
    with AdapterBank(model, slots=2, max_rank=8) as bank:
        for name, folder in folders.items():
            bank.load(name, folder)
        for names in ("biased other", "plain other", "plain plain", "dora biased", "plain biased", "other dora"):
            with bank.use(names.split()):
                found = model(x).logits
            wanted = [alone(model, folders[name], x[i : i + 1]) for i, name in enumerate(names.split())]
            torch.testing.assert_close(found, torch.cat(wanted), rtol=1e-4, atol=1e-4)


def test_a_batcher_gives_what_rows_give_alone(tmp_path):
    model = llama()
    folders = folders_of(model, tmp_path)
    with AdapterBank(model, slots=4, max_rank=8) as bank:
        for name, folder in folders.items():
            bank.load(name, folder)
        wanted = {}
        for name in SETTINGS:
            out = bank.generate(torch.tensor([[5, 7, 11]]), adapter_names=[name], max_new_tokens=5, do_sample=False)
            wanted[name] = out[0, 3:].tolist()
        with Batcher(bank, max_rows=4, max_tokens=64) as batcher:
            waiting = {name: batcher.submit([5, 7, 11], name, max_new_tokens=5) for name in SETTINGS}
            assert {name: request.result(60) for name, request in waiting.items()} == wanted


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda key, bias: {key: bias[:5].clone()}, r"has the lora_bias \[5\] at .*, expected \[32\]"),
        (lambda key, bias: {key: torch.full_like(bias, 3e38)}, r"has a lora_bias at .* that is not finite"),
        (
            lambda key, bias: {key.replace("q_proj", "v_proj"): bias.clone()},
            r"has a lora_bias without A and B of .*v_proj",
        ),
    ],
)
def test_a_bias_that_does_not_fit_is_refused(tmp_path, change, said):
    model = llama()
    folder = folders_of(model, tmp_path)["biased"]
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias"
    edit(folder, lambda tensors: tensors.update(change(key, tensors[key])))
    with AdapterBank(model, slots=1, max_rank=4) as bank:
        with pytest.raises(BadCheckpoint, match=said):
            bank.load("biased", folder)
        assert bank.names() == []
