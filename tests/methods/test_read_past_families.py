"""What "all-linear" leaves out of transformers' families whose kernels take weights; every other adapter trains."""

import pytest
import torch
import transformers

import fastpeft
from fastpeft import Lora

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64}
ATTENTION = SIZES | {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
SSM = {"mamba_d_state": 4, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1}
GEMMA3N = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64, "laurel_rank": 4}
ZAMBA2 = {"layers_block_type": ["linear_attention", "hybrid"]} | {
    "mamba_d_state": 4,
    "mamba_headdim": 8,
    "n_mamba_heads": 8,
    "mamba_ngroups": 1,
    "num_key_value_heads": 4,
}
GRIFFIN = {"num_hidden_layers": 3, "num_key_value_heads": 1, "lru_width": 32}
SLICED = {"pretraining_tp": 2, "slow_but_exact": True}

# Model, config, and the last names of the linear layers that are left out.
FAMILIES = {
    "Mamba": ("MambaForCausalLM", SIZES | {"state_size": 4}, {"x_proj", "dt_proj", "out_proj"}),
    "FalconMamba": ("FalconMambaForCausalLM", SIZES | {"state_size": 4}, {"x_proj", "dt_proj", "out_proj"}),
    "Mamba2": (
        "Mamba2ForCausalLM",
        SIZES | {"state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 1},
        {"out_proj"},
    ),
    "Jamba": ("JambaForCausalLM", ATTENTION | {"attn_layer_period": 2, "attn_layer_offset": 1}, {"dt_proj"}),
    "Bamba": ("BambaForCausalLM", ATTENTION | SSM | {"attn_layer_indices": [1]}, {"out_proj"}),
    "Zamba2": ("Zamba2ForCausalLM", ATTENTION | ZAMBA2, {"out_proj"}),
    "RecurrentGemma": ("RecurrentGemmaForCausalLM", ATTENTION | GRIFFIN, set()),
    "RWKV": ("RwkvForCausalLM", SIZES, {"output", "value"}),
    "xLSTM": ("xLSTMForCausalLM", SIZES | {"hidden_size": 128, "num_heads": 4}, set()),
    "Gemma3n": ("Gemma3nForCausalLM", ATTENTION | GEMMA3N | {"num_kv_shared_layers": 0}, {"correction_coefs"}),
    "Bloom": ("BloomForCausalLM", SIZES | {"n_head": 4}, set()),
    "Bloom, sliced": ("BloomForCausalLM", SIZES | {"n_head": 4} | SLICED, {"dense", "dense_4h_to_h"}),
    "Llama": ("LlamaForCausalLM", ATTENTION, set()),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family):
    name, settings, left_out = FAMILIES[family]
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**settings, pad_token_id=0, bos_token_id=1, eos_token_id=2)).train()
    linears = {path for path, m in model.named_modules() if type(m) is torch.nn.Linear} - {"lm_head", "head"}
    fastpeft.attach(model, Lora(r=2))
    missing = linears - set(model.fastpeft_attachment.linears)
    assert {path.rpartition(".")[2] for path in missing} == left_out
    ids = torch.arange(3, 17).view(2, 7)
    model(input_ids=ids, labels=ids).loss.backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert {row.status for row in fastpeft.report(model) if row.kind == "LoRA layers"} == {"fused"}
    fastpeft.detach(model)
    for path in missing:
        with pytest.raises(TypeError, match=f"targets names {path}, which is read past its forward, since"):
            fastpeft.attach(model, Lora(targets=[path]))
    print(f"{family}: without {', '.join(sorted(left_out)) or 'nothing'}; {len(linears - missing)} adapters train")
