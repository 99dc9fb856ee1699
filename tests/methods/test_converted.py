"""PiSSA's and OLoRA's adapters that PEFT wrote as plain LoRA are loaded, and served, with PEFT's outputs."""

import pytest
import torch

import fastpeft
from fastpeft.serving import AdapterBank
from tests.support.models import llama

peft = pytest.importorskip("peft", reason="PEFT is not installed")
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def converted(start, folder):
    """PEFT's model, trained a little, and the folder of what it becomes beside the base as it was."""
    torch.manual_seed(2)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=start)
    model = peft.get_peft_model(llama(), config).eval()
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(folder / "start")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) / 16)
    model.save_pretrained(folder / "end", path_initial_model_for_weight_conversion=folder / "start")
    return model, folder / "end"


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_outputs_are_pefts(start, tmp_path):
    model, folder = converted(start, tmp_path)
    with torch.no_grad():
        base, wanted = llama().eval()(IDS).logits, model(IDS).logits
        attached = llama().eval()
        fastpeft.load(attached, folder)
        plain = peft.PeftModel.from_pretrained(llama(), folder).eval()(IDS).logits
        error = (plain - wanted).abs().max()
        assert (wanted - base).abs().max() > 100 * error
        assert (attached(IDS).logits - wanted).abs().max() <= 2 * error
        served = llama().eval()
        with AdapterBank(served, slots=1, max_rank=8) as bank:
            bank.load("x", folder)
            with bank.use(["x", None]):
                found = served(IDS).logits
    assert (found[0] - wanted[0]).abs().max() <= 2 * error
    torch.testing.assert_close(found[1], base[1])


def test_kasa_is_refused_by_name(tmp_path):
    if not hasattr(peft, "KasaConfig"):
        pytest.skip("this PEFT has no KaSA")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], kasa_config=peft.KasaConfig())
    peft.get_peft_model(llama(), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="kasa_config="):
        fastpeft.load(llama(), tmp_path)
    with AdapterBank(llama(), slots=1, max_rank=8) as bank, pytest.raises(ValueError, match="kasa_config="):
        bank.load("x", tmp_path)
