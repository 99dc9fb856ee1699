"""DoRA in a bank: each row of a mixed batch is what it is alone, and what PEFT gives; slots are given to others."""

import copy

import pytest
import torch

from fastpeft.serving import AdapterBank, BadCheckpoint, Batcher

pytest.importorskip("peft", reason="PEFT is not installed")
import peft

from tests.support.lora_checkpoints import checkpoint
from tests.support.models import build, llama, prompts
from tests.support.quantised_models import ids, load
from tests.support.spoiled import edit

SETTINGS = {
    "plain": {"r": 4, "target_modules": ["q_proj", "v_proj", "up_proj"]},
    "dora": {"r": 4, "target_modules": ["q_proj", "k_proj", "down_proj"], "use_dora": True},
    "other": {
        "r": 6, "rank_pattern": {"q_proj": 3}, "use_rslora": True, "use_dora": True,
        "target_modules": ["q_proj", "o_proj", "gate_proj", "up_proj"],
    },
}  # fmt: skip
MIXED = ["dora", None, "other", "plain", "dora", None]


def trained(model, folder, seed, **settings):
    """A checkpoint whose magnitudes are the rows' norms, some more and some less."""
    torch.manual_seed(1000 + seed)
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(lora_alpha=8, **settings))
    for name, parameter in adapted.named_parameters():
        if "magnitude" in name:
            parameter.data.mul_(1 + 0.3 * torch.randn_like(parameter))
        elif "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(folder)
    return folder


def folders_of(model, root):
    return {name: trained(model, root / name, i, **SETTINGS[name]) for i, name in enumerate(SETTINGS)}


@torch.no_grad()
def alone(model, folder, x):
    if folder is None:
        return copy.deepcopy(model)(x).logits
    return peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()(x).logits


@pytest.mark.parametrize("family", ["llama", "qwen2"])  # without biases, and with some
@torch.no_grad()
def test_rows_of_a_mixed_batch_are_pefts(tmp_path, family):
    model, x = build(family).eval(), prompts(len(MIXED))
    folders = folders_of(model, tmp_path)
    wanted = torch.cat([alone(model, folders.get(name), x[i : i + 1]) for i, name in enumerate(MIXED)])
    bare = model(x).logits
    with AdapterBank(model, slots=3, max_rank=8) as bank:
        for name, folder in folders.items():
            bank.load(name, folder)
        for _ in range(3):
            with bank.use(MIXED):
                logits = model(x).logits
            torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
        base = [i for i, name in enumerate(MIXED) if name is None]
        assert torch.equal(logits[base], bare[base])
        for i, name in enumerate(MIXED):
            with bank.use([name]):
                torch.testing.assert_close(model(x[i : i + 1]).logits, logits[i : i + 1], rtol=1e-5, atol=1e-5)
    assert torch.equal(model(x).logits, bare)


@torch.no_grad()
def test_a_slot_is_given_to_others(tmp_path):
    """LoRA in a slot that DoRA had, alone and beside DoRA on the same layers: as if nobody had been there."""
    model, x = llama(), prompts(2)
    folders = folders_of(model, tmp_path)
    with AdapterBank(model, slots=2, max_rank=8) as bank:
        for name, folder in folders.items():
            bank.load(name, folder)
        for names in ("dora other", "plain plain", "plain dora", "plain other", "other dora", "dora plain"):
            with bank.use(names.split()):
                found = model(x).logits
            wanted = [alone(model, folders[name], x[i : i + 1]) for i, name in enumerate(names.split())]
            torch.testing.assert_close(found, torch.cat(wanted), rtol=1e-4, atol=1e-4)


def test_a_batcher_gives_what_rows_give_alone(tmp_path):
    model = llama()
    folders = folders_of(model, tmp_path)
    with AdapterBank(model, slots=3, max_rank=8) as bank:
        for name, folder in folders.items():
            bank.load(name, folder)
        wanted = {}
        for name in SETTINGS:
            out = bank.generate(torch.tensor([[5, 7, 11]]), adapter_names=[name], max_new_tokens=5, do_sample=False)
            wanted[name] = out[0, 3:].tolist()
        with Batcher(bank, max_rows=4, max_tokens=64) as batcher:
            waiting = {name: batcher.submit([5, 7, 11], name, max_new_tokens=5) for name in SETTINGS}
            assert {name: request.result(60) for name, request in waiting.items()} == wanted


def test_a_quantised_base(tmp_path):
    model, x = load().train(), ids(2, 40)  # in training mode bitsandbytes does not repack the weights for a CPU
    folder = trained(model, tmp_path / "dora", 0, r=4, target_modules=["q_proj", "down_proj"], use_dora=True)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder)
    with torch.no_grad():
        wanted = theirs(x).logits
        with AdapterBank(model, slots=1, max_rank=4) as bank:
            bank.load("dora", folder)
            with bank.use(["dora", "dora"]):
                found = model(x).logits
    assert (found - wanted).norm() < 8 * torch.finfo(torch.bfloat16).eps * wanted.norm()


def test_what_is_not_served_is_named(tmp_path):
    model = llama()
    folder = checkpoint(model, tmp_path / "embedded", r=4, target_modules=["embed_tokens"], use_dora=True)
    good = trained(model, tmp_path / "good", 0, **SETTINGS["dora"])
    with AdapterBank(model, slots=1, max_rank=4) as bank:
        with pytest.raises(BadCheckpoint, match=r"DoRA at model\.embed_tokens, expected it on linear layers alone"):
            bank.load("embedded", folder)
        edit(good, lambda tensors: tensors.update({k: t[:5].clone() for k, t in tensors.items() if "magnitude" in k}))
        with pytest.raises(BadCheckpoint, match=r"has the magnitude \[5\] at .*, expected \[32\]"):
            bank.load("good", good)
        assert bank.names() == []
