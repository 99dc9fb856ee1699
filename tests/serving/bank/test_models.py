"""Models that differ from Llama where a bank or a batcher could go wrong, each from its config."""

import random

import pytest
import torch
import transformers
from torch import nn

from fastpeft.serving import AdapterBank, BadCheckpoint, Batcher

pytest.importorskip("peft", reason="PEFT is not installed")
from tests.support.lora_checkpoints import checkpoint, greedy_alone, peft_model, same_or_tied
from tests.support.models import VOCAB, prompts

COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "initializer_range": 0.15,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
GROUPED = {"num_key_value_heads": 2, "intermediate_size": 64}
WINDOWS = ["sliding_attention", "full_attention", "sliding_attention"]
MODELS = {
    "Qwen3": {**GROUPED, "head_dim": 8},  # works on q before it calls k
    "Gemma3": {**GROUPED, "head_dim": 8, "sliding_window": 6, "layer_types": WINDOWS},  # a scaled embedding
    "OPT": {"ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.15},  # flattens [B, L, K] for its MLP
    "Falcon": {"alibi": True},  # no position ids, a fused qkv
}


def build(kind, **settings):
    torch.manual_seed(0)
    config = getattr(transformers, {"Gemma3": "Gemma3TextConfig"}.get(kind, f"{kind}Config"))
    return getattr(transformers, f"{kind}ForCausalLM")(config(**{**COMMON, **settings})).eval()


@pytest.fixture(params=MODELS)
def model(request):
    return build(request.param, **MODELS[request.param])


def test_rows_and_requests_are_their_adapters(model, tmp_path):
    """Each row equals PEFT with that adapter alone; requests in a running batch get the tokens that they get alone."""
    linears = {path.rpartition(".")[2] for path, m in model.named_modules() if isinstance(m, nn.Linear)} - {"lm_head"}
    embedding = next(path for path, m in model.named_modules() if isinstance(m, nn.Embedding)).rpartition(".")[2]
    folders = {
        "all": checkpoint(model, tmp_path / "all", 1, r=4, target_modules=sorted(linears)),
        "few": checkpoint(model, tmp_path / "few", 2, r=6, target_modules=[embedding, *sorted(linears)[:2]]),
    }
    rows, ids = ["all", None, "few", "all"], prompts(4, 9)
    adapted = peft_model(model, folders)
    bank = AdapterBank(model, slots=2, max_rank=8)
    for name, folder in folders.items():
        bank.load(name, folder)
    with bank.use(rows):
        logits = model(ids).logits
    with torch.no_grad():
        for i, name in enumerate(rows):
            if name is None:
                with adapted.disable_adapter():
                    expected = adapted(ids[i : i + 1]).logits
            else:
                adapted.set_adapter(name)
                expected = adapted(ids[i : i + 1]).logits
            torch.testing.assert_close(logits[i : i + 1], expected, rtol=1e-5, atol=1e-5)
    choose = random.Random(0)
    asked = [
        ([choose.randrange(1, VOCAB) for _ in range(choose.randint(1, 20))], choose.choice(rows), choose.randint(1, 14))
        for _ in range(12)
    ]
    with Batcher(bank, max_rows=5, max_tokens=64) as batcher:
        requests = [batcher.submit(prompt, name, max_new_tokens=count) for prompt, name, count in asked]
        results = [request.result(60) for request in requests]
    for (prompt, name, count), tokens in zip(asked, results, strict=True):
        same_or_tied(bank, prompt, name, tokens, greedy_alone(bank, prompt, name, count))


def test_experts_of_another_checkpoint_are_refused(tmp_path):
    """Attention beside them is served alone; `test_experts.py` has what is served of experts."""
    from peft import LoraConfig

    model = build("Mixtral", **GROUPED, num_local_experts=4)
    good = checkpoint(model, tmp_path / "good", r=4, target_modules=["q_proj", "o_proj"])
    bank = AdapterBank(model, slots=1, max_rank=4)
    bank.load("good", good)
    fields = LoraConfig(r=4, target_modules=["q_proj"], target_parameters=["gate_up_proj"]).to_dict()
    with pytest.raises(BadCheckpoint, match=r"lora_A \[1\] of x is not of rank 4 for each expert"):
        bank.load("experts", {"base_model.model.x.lora_A.weight": torch.ones(1)}, config=fields)


def test_a_recurrent_model_has_no_rows_to_batch():
    model = build("Mamba")
    bank = AdapterBank(model)
    with pytest.raises(
        ValueError, match="Batcher: model is MambaForCausalLM with a .*, expected one whose cache is keys"
    ):
        Batcher(bank)
