"""A small model of every family that transformers can generate text with, from its config made small by one rule."""

import inspect
from typing import Any

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from transformers import CONFIG_MAPPING  # noqa: E402  # after the skip
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # noqa: E402

VOCAB, WINDOW = 96, 5

# What every config's fields of these names are set to, where it has them and they are not None.
_SMALL = {
    32: "hidden_size d_model n_embd attention_hidden_size lru_width embedding_size mamba_d_ssm",
    48: "intermediate_size ffn_dim d_ff n_inner dim_ff decoder_ffn_dim encoder_ffn_dim",
    2: (
        "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers num_key_value_heads "
        "num_experts_per_tok num_experts_per_token linear_num_key_heads"
    ),
    4: (
        "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
        "num_decoder_attention_heads num_encoder_attention_heads num_experts num_local_experts n_routed_experts "
        "moe_num_experts mamba_n_heads mamba_num_heads linear_num_value_heads"
    ),
    8: (
        "head_dim q_lora_rank kv_lora_rank qk_rope_head_dim qk_nope_head_dim v_head_dim mamba_d_head mamba_d_state "
        "mamba_head_dim ssm_state_size state_size linear_key_head_dim linear_value_head_dim kv_channels rotary_dim"
    ),
    1: (
        "encoder_layers num_encoder_layers n_group topk_group first_k_dense_replace n_groups mamba_n_groups "
        "decoder_start_token_id"
    ),
    24: "moe_intermediate_size shared_expert_intermediate_size",
    512: "max_position_embeddings n_positions",
    VOCAB: "vocab_size pronunciation_vocab_size shape_vocab_size",
    WINDOW: "sliding_window",
    0.15: "initializer_range",
    0.0: (
        "dropout dropout_rate resid_pdrop embd_pdrop attn_pdrop hidden_dropout_prob attention_probs_dropout_prob "
        "attention_dropout activation_dropout hidden_dropout layerdrop decoder_layerdrop embedding_dropout dropout_p"
    ),
}
SMALL: dict[str, Any] = {name: value for value, names in _SMALL.items() for name in names.split()}
SMALL["pad_token_id"] = 0
_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
_CONV = {"layer_types": ["conv", "full_attention"]}
# What the rule does not know, by family.
SETTINGS: dict[str, dict] = {
    "bailing_hybrid": _HYBRID,
    "qwen3_5_moe_text": _HYBRID,
    "qwen3_5_text": _HYBRID,
    "qwen3_next": _HYBRID,
    "kimi_linear": _HYBRID,
    "lfm3": _CONV,
    "lfm2_moe": _CONV,
    "bamba": {"mamba_n_heads": 8, "attn_layer_indices": [1]},
    "granitemoehybrid": {"mamba_n_heads": 8, "layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "num_experts": 2},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
    "zaya": {"num_experts_per_tok": 1},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "local"]},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1},
    "deepseek_v2": {"topk_method": "greedy", "num_experts_per_tok": 2, "qk_head_dim": 16},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "moe_topk": 2},
    "ministral": {"head_dim": 8},
    "prophetnet": {"num_hidden_layers": None, "num_decoder_layers": 2},
    "gemma3n_text": {
        "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gemma4_text": {"vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0},
    "qwen4_exp_text": {"layer_types": ["full_attention"] * 2},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "xlstm": {"hidden_size": 128, "num_blocks": 2, "qk_dim_factor": 0.5},
    "zamba2": {
        "attention_hidden_size": 64,
        "layers_block_type": ["mamba", "hybrid"],
        "n_mamba_heads": 8,
        "mamba_headdim": 8,
        "attention_head_dim": 16,
        "num_key_value_heads": 4,
        "adapter_rank": 8,
    },
    "zamba": {
        "attention_hidden_size": 64,
        "layers_block_type": ["mamba", "hybrid", "hybrid"],
        "num_hidden_layers": 3,
        "attention_head_dim": 16,
        "num_key_value_heads": 4,
        "mamba_dt_rank": 4,
    },
    "longcat_flash": {
        "qk_head_dim": 16, "head_dim": 8, "ffn_hidden_size": 48, "expert_ffn_hidden_size": 24, "moe_topk": 2,
        "zero_expert_num": 2,
    },
}  # fmt: skip
# Families whose name in transformers stands for a class that another name of theirs builds from a smaller config.
_SAME = ("qwen3_5", "qwen3_5_moe", "qwen4_exp", "llama4", "gemma3", "gemma3n", "gemma4", "gemma4_unified")


def families() -> list[str]:
    """Of several that are served by one class, the one whose config it is."""
    found: dict[str, str] = {}
    for name, head in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        own = getattr(getattr(transformers, head, None), "config_class", None)
        if name not in _SAME and (head not in found or name == getattr(own, "model_type", None)):
            found[head] = name
    return sorted(found.values())


def config_of(family: str, **settings) -> Any:
    """Its config, small."""
    kind = CONFIG_MAPPING[family]
    base = kind()
    text = base.get_text_config(decoder=True)
    parts = [name for name in getattr(kind, "sub_configs", {}) if getattr(base, name, None) is text]
    own = {**SETTINGS.get(family, {}), **settings}
    if not parts:
        decodes = {"is_decoder": True} if _has(base, "is_decoder") else {}
        return kind(**_without_none({**_small(base), **decodes, **own}))
    words = {name: value for name, value in _small(base).items() if name == "pad_token_id"}
    return kind(**words, **{parts[0]: _without_none({**_small(text), **own})})


def _without_none(settings: dict) -> dict:
    return {name: value for name, value in settings.items() if value is not None}


def _small(config: Any) -> dict[str, Any]:
    found = {name: value for name, value in SMALL.items() if _has(config, name)}
    if "kv_lora_rank" in found:  # the head's width is that of its two parts
        found.pop("head_dim", None)
        found["num_key_value_heads"] = 4
    return found


def _has(config: Any, name: str) -> bool:
    attribute = inspect.getattr_static(type(config), name, None)
    if isinstance(attribute, property) and attribute.fset is None:
        return False
    try:
        return getattr(config, name, None) is not None or (name == "pad_token_id" and hasattr(config, name))
    except Exception:  # a field that differs by layer
        return True


class Unbuildable(Exception):
    """Why no small model can be made."""


def build(family: str, **settings) -> nn.Module:
    """A small model in evaluation mode, the same each time; it ends no sequence by itself."""
    head = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family])
    try:
        config = config_of(family, **settings)
        with torch.device("meta"):
            size = sum(p.numel() for p in head(config).parameters())
    except Exception as error:
        raise Unbuildable(f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:90]}") from error
    if size > 4e6:
        raise Unbuildable(f"{size / 1e6:.0f} million parameters, of a part that is not the decoder")
    torch.manual_seed(0)
    try:
        model = head(config).eval()
        with torch.no_grad():
            model(torch.arange(3, 10)[None])
    except Exception as error:
        raise Unbuildable(f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:90]}") from error
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = None
    return model
