"""A bank on models with experts: adapters of different ranks in one batch, each row as PEFT computes it alone."""

import copy

import pytest
import torch

import fastpeft
from fastpeft import Lora
from fastpeft.serving import AdapterBank, BadCheckpoint
from tests.support.expert_models import close, parameters_of
from tests.support.models import build, prompts

peft = pytest.importorskip("peft", reason="PEFT is not installed")
if not hasattr(peft.tuners.lora.layer, "ParamWrapper"):
    pytest.skip("PEFT before 0.17 has no LoRA on parameters", allow_module_level=True)

ADAPTERS = {
    "alice": {"r": 2, "alpha": 6},
    "bob": {"r": 5, "alpha": 3, "rslora": True, "rank_pattern": {"down_proj": 3}},
    "carol": {"r": 4, "experts": ["experts.down_proj"]},
    "dave": {"r": 3, "experts": False},
}
NAMES = parameters_of("qwen3_moe")
ROWS = ["bob", None, "alice", "dave", "carol", "bob"]


def checkpoints(family, root):
    for seed, (name, settings) in enumerate(ADAPTERS.items()):
        torch.manual_seed(seed)
        config = {"init": "random", "targets": ["q_proj", "o_proj"], "experts": parameters_of(family), **settings}
        model = fastpeft.attach(build(family), Lora(**config))
        fastpeft.save(model, root / name)
    return {name: root / name for name in ADAPTERS}


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llama4", "nemotron_h", "deepseek_v3"])
def test_a_mixed_batch_is_each_alone(family, tmp_path):
    folders, ids, model = checkpoints(family, tmp_path), prompts(len(ROWS)), build(family)
    bare = model(input_ids=ids).logits
    with AdapterBank(model, slots=4, max_rank=8) as bank, torch.no_grad():
        for name, folder in folders.items():
            bank.load(name, folder)
        with bank.use(ROWS):
            mixed = model(input_ids=ids).logits
        for row, name in enumerate(ROWS):
            with bank.use([name]):
                assert close(model(input_ids=ids[row : row + 1]).logits, mixed[row : row + 1]), name
        assert torch.equal(model(input_ids=ids).logits, bare)
        for name, folder in folders.items():
            theirs = peft.PeftModel.from_pretrained(build(family), folder)
            rows = [row for row, other in enumerate(ROWS) if other == name]
            assert close(theirs(input_ids=ids[rows]).logits, mixed[rows]), name
    assert torch.equal(model(input_ids=ids).logits, bare)
    assert "forward" not in vars(next(m for p, m in model.named_modules() if p.endswith("experts")))


def test_slots_are_shared(tmp_path):
    """Fewer slots than adapters: what takes the slot of another leaves nothing of it."""
    folders, ids, model = checkpoints("qwen3_moe", tmp_path), prompts(1), build("qwen3_moe")
    with AdapterBank(model, slots=4, max_rank=8) as wide, torch.no_grad():
        for name, folder in folders.items():
            wide.load(name, folder)
        alone = {}
        for name in folders:
            with wide.use([name]):
                alone[name] = model(input_ids=ids).logits
    with AdapterBank(model, slots=1, max_rank=8) as bank, torch.no_grad():
        for name, folder in folders.items():
            bank.load(name, folder)
        for name in ["bob", "carol", "alice", "dave", "carol", "bob"]:
            with bank.use([name]):
                assert torch.equal(model(input_ids=ids).logits, alone[name])


def test_rows_of_other_lengths(tmp_path):
    """Rows one after the other, as in continuous batching."""
    folders, model = checkpoints("mixtral", tmp_path), build("mixtral")
    layer, lengths = model.model.layers[0].mlp.experts, [3, 1, 4]
    x, index, weights = torch.randn(8, 32), torch.randint(6, (8, 2)), torch.rand(8, 2)
    with AdapterBank(model, slots=4, max_rank=8) as bank, torch.no_grad():
        for name, folder in folders.items():
            bank.load(name, folder)
        with bank.use(["alice", None, "bob"], lengths=lengths):
            found = layer(x, index, weights)
        for name, rows in (("alice", slice(0, 3)), (None, slice(3, 4)), ("bob", slice(4, 8))):
            with bank.use([name]):
                assert close(layer(x[rows], index[rows], weights[rows]), found[rows])


def test_generation(tmp_path):
    folders, ids, model = checkpoints("qwen3_moe", tmp_path), prompts(3), build("qwen3_moe")
    with AdapterBank(model, slots=4, max_rank=8) as bank:
        for name, folder in folders.items():
            bank.load(name, folder)
        rows, settings = ["carol", "alice", None], {"max_new_tokens": 5, "do_sample": False}
        mixed = bank.generate(ids, adapter_names=rows, **settings)
        for row, name in enumerate(rows):
            alone = bank.generate(ids[row : row + 1], adapter_names=[name], **settings)
            assert torch.equal(alone[0], mixed[row])


def test_what_is_refused(tmp_path):
    folders, model = checkpoints("qwen3_moe", tmp_path), build("qwen3_moe")
    with AdapterBank(model, slots=2, max_rank=4) as bank:
        with pytest.raises(BadCheckpoint, match="rank 5 at model.layers.0.mlp.experts.gate_up_proj, expected at most"):
            bank.load("bob", folders["bob"])
        with pytest.raises(BadCheckpoint, match=r"A \[12, 32\] at .*gate_up_proj, expected \[18, 32\]"):
            bank.load("x", folders["alice"], config=Lora(r=3, targets=["q_proj", "o_proj"], experts=NAMES))
    with AdapterBank(build("mixtral"), slots=2, max_rank=8) as bank:
        with pytest.raises(BadCheckpoint):
            bank.load("alice", folders["alice"])
    with AdapterBank(model, slots=2, max_rank=8, targets=["q_proj", "o_proj"]) as bank:
        with pytest.raises(BadCheckpoint, match="gate_up_proj, which is not among the bank's targets"):
            bank.load("alice", folders["alice"])


def test_a_copy_of_the_model_has_no_bank(tmp_path):
    folders, model, ids = checkpoints("qwen3_moe", tmp_path), build("qwen3_moe"), prompts(1)
    bare = model(input_ids=ids).logits
    with AdapterBank(model, slots=2, max_rank=8) as bank, torch.no_grad():
        bank.load("alice", folders["alice"])
        other = copy.deepcopy(model)
        with bank.use(["alice"]):
            assert torch.equal(other(input_ids=ids).logits, bare)
            other.model.layers[0].mlp.experts.down_proj.zero_()
            assert not torch.equal(other(input_ids=ids).logits, bare)
