"""A bank and a batcher over a model in 4 bits: each row has its adapter's logits, as PEFT gives them alone."""

import pytest
import torch

from fastpeft.serving import AdapterBank, Batcher

pytest.importorskip("peft", reason="PEFT is not installed")
from tests.support.lora_checkpoints import checkpoint, peft_model
from tests.support.quantised_models import ids, load

BF16 = torch.bfloat16


def test_rows_of_a_mixed_batch_are_pefts(tmp_path):
    # In training mode bitsandbytes does not repack the weights for a CPU, which would round their scales.
    model = load().train()
    names = ("one", "two")
    settings = {"r": 4, "target_modules": ["q_proj", "down_proj"]}
    folders = {name: checkpoint(model, tmp_path / name, i, **settings) for i, name in enumerate(names)}
    theirs = peft_model(model, folders).train()
    bank = AdapterBank(model, slots=2, max_rank=4)
    for name, folder in folders.items():
        bank.load(name, folder)
    x = ids(3, 40)
    with torch.no_grad(), bank.use(["one", None, "two"]):
        logits = model(x).logits
    for i, name in enumerate(("one", None, "two")):
        with torch.no_grad():
            if name is None:
                with theirs.disable_adapter():
                    wanted = theirs(x[i : i + 1]).logits
            else:
                theirs.set_adapter(name)
                wanted = theirs(x[i : i + 1]).logits
        assert (logits[i] - wanted[0]).norm() < 8 * torch.finfo(BF16).eps * wanted.norm()
    assert not torch.equal(logits[0], logits[2])


def test_generates(tmp_path):
    model = load().eval()
    bank = AdapterBank(model, slots=1, max_rank=4)
    bank.load("one", checkpoint(model, tmp_path / "one", r=4, target_modules=["q_proj"]))
    with Batcher(bank, max_rows=2, max_tokens=64) as batcher:
        results = [batcher.submit([5, 7, 11], name, max_new_tokens=4).result(60) for name in ("one", None)]
    assert [len(tokens) for tokens in results] == [4, 4]
