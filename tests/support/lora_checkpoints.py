"""LoRA checkpoints in PEFT's format for a small Llama, and PEFT's own model with them, for the tests of serving."""

import copy

import torch
from peft import LoraConfig, PeftModel, get_peft_model

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SETTINGS = {
    "alice": {"r": 4, "target_modules": LINEARS},
    "bob": {"r": 8, "lora_alpha": 5, "use_rslora": True, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "carol": {
        "r": 6,
        "rank_pattern": {"q_proj": 3, r"1\.mlp\.up_proj": 12},
        "alpha_pattern": {"k_proj": 1.5},
        "target_modules": LINEARS,
    },
    "dave": {"r": 5, "target_modules": ["embed_tokens", "lm_head", "q_proj"]},
}


def checkpoint(model, directory, seed=0, **settings):
    """Write an adapter whose A and B are random, and return its folder."""
    torch.manual_seed(1000 + seed)
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(**{"lora_alpha": 8, **settings}))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(directory)
    return directory


def checkpoints(model, root, names=tuple(SETTINGS)):
    return {name: checkpoint(model, root / name, seed, **SETTINGS[name]) for seed, name in enumerate(names)}


def peft_model(model, folders):
    """PEFT's model with the same adapters, on a copy."""
    names = list(folders)
    adapted = PeftModel.from_pretrained(copy.deepcopy(model), folders[names[0]], adapter_name=names[0])
    for name in names[1:]:
        adapted.load_adapter(folders[name], adapter_name=name)
    return adapted.eval()


@torch.no_grad()
def greedy_alone(bank, ids, name, count):
    """The greedy tokens of one adapter, one row, no batch."""
    out = bank.generate(torch.tensor([ids]), adapter_names=[name], max_new_tokens=count, do_sample=False)
    return out[0, len(ids) :].tolist()


@torch.no_grad()
def same_or_tied(bank, ids, name, tokens, alone):
    """Whether two greedy continuations part; that must be at a tie, where the top two logits are within 1e-4."""
    if tokens == alone:
        return False
    place = next(i for i, pair in enumerate(zip(tokens, alone, strict=False)) if pair[0] != pair[1])
    with bank.use([name]):
        logits = bank.model(torch.tensor([[*ids, *alone[:place]]])).logits[0, -1]
    top = logits.topk(2)
    assert {tokens[place], alone[place]} == set(top.indices.tolist()), (tokens, alone)
    assert top.values[0] - top.values[1] <= 1e-4, (tokens, alone)
    return True
