"""Checkpoints from before experts were stacked: loaded and served as what PEFT computes with an expert's own layers."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastpeft
from fastpeft import Lora
from fastpeft.methods.formats.conversion import convert
from fastpeft.methods.formats.inspection import inspect_checkpoints
from fastpeft.serving import AdapterBank, BadCheckpoint
from tests.support.expert_models import IDS, close, loss_of, with_experts_apart
from tests.support.models import build

peft = pytest.importorskip("peft", reason="PEFT is not installed")

SWIGLU, MIXTRAL = ("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")
FAMILIES = {
    "qwen3_moe": SWIGLU, "qwen2_moe": SWIGLU, "deepseek_v3": SWIGLU, "olmoe": SWIGLU, "mixtral": MIXTRAL,
    "nemotron_h": ("up_proj", "down_proj"),
}  # fmt: skip
MOVED = ".mlp.", ".block_sparse_moe."  # where Mixtral had its experts
WEIGHTS = "adapter_model.safetensors"


def rewrite(folder, tensors=None, fields=None):
    """Change the tensors by a function of their dict, and fields of the config."""
    found = load_file(folder / WEIGHTS)
    save_file(tensors(found) if tensors else found, folder / WEIGHTS)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | (fields or {})))


def older(family, folder, **settings):
    """An adapter on experts that are modules, its folder, and PEFT's logits with it."""
    names = FAMILIES[family]
    model = with_experts_apart(build(family), names)
    torch.manual_seed(2)
    config = {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", *names], **settings}
    theirs = peft.get_peft_model(model, peft.LoraConfig(**config, init_lora_weights=False)).eval()
    theirs.save_pretrained(folder)
    if family == "mixtral":
        rewrite(folder, lambda found: {key.replace(*MOVED): t for key, t in found.items()})
    return theirs(input_ids=IDS).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rslora", [False, True])
def test_loaded_is_what_it_was(family, rslora, tmp_path):
    wanted = older(family, tmp_path / "old", use_rslora=rslora)
    model = fastpeft.load(build(family), tmp_path / "old", is_trainable=True)
    assert all(row.fused for row in fastpeft.report(model)), fastpeft.report(model)
    assert close(model(input_ids=IDS).logits, wanted)
    assert not close(build(family)(input_ids=IDS).logits, wanted)
    loss_of(model).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    fastpeft.save(model, tmp_path / "new")
    again = fastpeft.load(build(family), tmp_path / "new")
    assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral"])
def test_what_it_becomes_is_pefts(family, tmp_path):
    """PEFT reads both: the older folder, which it stacks itself, and what we write of it."""
    wanted = older(family, tmp_path / "old")
    if not hasattr(peft.tuners.lora.layer, "ParamWrapper"):
        pytest.skip("PEFT before 0.17 has no LoRA on parameters")
    fastpeft.save(fastpeft.load(build(family), tmp_path / "old"), tmp_path / "new")
    assert close(peft.PeftModel.from_pretrained(build(family), tmp_path / "new")(input_ids=IDS).logits, wanted)


@pytest.mark.parametrize("only", [("down_proj",), ("gate_proj", "up_proj")])
def test_some_of_the_layers(only, tmp_path):
    wanted = older("qwen3_moe", tmp_path, target_modules=["o_proj", *only], rank_pattern={"up_proj": 5, "gate_proj": 5})
    model = fastpeft.load(build("qwen3_moe"), tmp_path)
    assert close(model(input_ids=IDS).logits, wanted)


def test_ranks_may_differ_where_scales_do_not(tmp_path):
    patterns = {"rank_pattern": {"up_proj": 6}, "alpha_pattern": {"up_proj": 14}}
    wanted = older("qwen3_moe", tmp_path, **patterns)
    assert close(fastpeft.load(build("qwen3_moe"), tmp_path)(input_ids=IDS).logits, wanted)


def test_layers_of_the_stack_may_differ(tmp_path):
    patterns = {"rank_pattern": {r"layers\.1\..*": 4}, "alpha_pattern": {r"layers\.1\..*": 9}}
    wanted = older("qwen3_moe", tmp_path, **patterns)
    assert close(fastpeft.load(build("qwen3_moe"), tmp_path)(input_ids=IDS).logits, wanted)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_a_router_that_was_a_linear_layer(family, tmp_path):
    old, new, layers = tmp_path / "old", tmp_path / "new", FAMILIES[family]
    torch.manual_seed(3)
    names = ["gate.weight", "experts.gate_up_proj", "experts.down_proj"]
    fastpeft.save(fastpeft.attach(build(family), Lora(r=3, targets=["q_proj"], experts=names, init="random")), new)
    older(family, old)
    routers = {key: tensor for key, tensor in load_file(new / WEIGHTS).items() if ".mlp.gate." in key}
    assert len(routers) == 4
    before = {key.replace(*MOVED) if family == "mixtral" else key: tensor for key, tensor in routers.items()}
    rewrite(old, lambda found: found | before, {"target_modules": ["q_proj", "gate", *layers]})
    model = fastpeft.load(build(family), old)
    found = fastpeft.methods.adapter_state_dict(model)
    assert all(torch.equal(found[key], tensor) for key, tensor in routers.items())
    fastpeft.load(model, old, name="again")  # where an adapter is on it already


def test_a_bank_serves_it(tmp_path):
    wanted, model = older("qwen3_moe", tmp_path), build("qwen3_moe")
    bare = model(input_ids=IDS).logits
    with AdapterBank(model, slots=2, max_rank=6) as bank, torch.no_grad():
        bank.load("old", tmp_path)
        with bank.use(["old", None]):
            logits = model(input_ids=IDS).logits
    assert close(logits[0], wanted[0])
    assert close(logits[1], bare[1])
    with AdapterBank(model, slots=2, max_rank=5) as bank:
        with pytest.raises(BadCheckpoint, match=r"rank 6 at .*gate_up_proj, expected at most the bank's max_rank=5"):
            bank.load("old", tmp_path)


def test_experts_that_are_modules_stay_so(tmp_path):
    wanted = older("qwen3_moe", tmp_path)
    model = fastpeft.load(with_experts_apart(build("qwen3_moe"), SWIGLU), tmp_path)
    assert close(model(input_ids=IDS).logits, wanted)


def test_inspect_and_convert(tmp_path):
    wanted = older("qwen3_moe", tmp_path / "old")
    (found,) = inspect_checkpoints(tmp_path / "old")
    assert not found.problems
    assert any("each expert" in note for note in found.notes)
    convert(tmp_path / "old", tmp_path / "copy", "fastpeft")
    assert close(fastpeft.load(build("qwen3_moe"), tmp_path / "copy")(input_ids=IDS).logits, wanted)


BROKEN = {
    "no expert 4": (lambda key: ".experts.4.down_proj." not in key, {}, r"has no lora_A of .*experts\.4\.down_proj"),
    "no up": (lambda key: ".up_proj." not in key, {}, r"has no lora_A of .*experts\.0\.up_proj"),
    "two scales": (None, {"alpha_pattern": {"up_proj": 8}}, r"gate_proj and up_proj of .* have scales"),
    "an expert of its own": (None, {"alpha_pattern": {r"experts\.3\.up_proj": 8}}, "expected those of one expert"),
    "DoRA": (None, {"use_dora": True}, "lora_magnitude_vector"),
}


@pytest.mark.parametrize(("keep", "fields", "message"), BROKEN.values(), ids=BROKEN)
def test_what_no_pair_can_say_is_refused(keep, fields, message, tmp_path):
    older("qwen3_moe", tmp_path)
    rewrite(tmp_path, keep and (lambda found: {key: t for key, t in found.items() if keep(key)}), fields)
    model, before = build("qwen3_moe"), build("qwen3_moe")
    with pytest.raises(ValueError, match=message):
        fastpeft.load(model, tmp_path)
    assert str(model) == str(before)
    with AdapterBank(model, slots=1, max_rank=8) as bank, pytest.raises(BadCheckpoint, match=message):
        bank.load("old", tmp_path)


def test_another_models_sizes_are_refused(tmp_path):
    older("qwen3_moe", tmp_path)
    with pytest.raises(ValueError, match=r"for another model: it has lora_B \[24, 3\] of .*, expected \[20, 3\]"):
        fastpeft.load(build("qwen3_moe", moe_intermediate_size=20), tmp_path)
    with pytest.raises(ValueError, match=r"for another model: it has .*experts\.5, the model 4 experts"):
        fastpeft.load(build("qwen3_moe", num_experts=4), tmp_path)
    with pytest.raises(ValueError, match=r"cannot be stacked: .* another way round"):
        fastpeft.load(build("gpt_oss"), tmp_path)
