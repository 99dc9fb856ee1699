"""The one factory of small models: transformers of every family that tests need, from configs, the same each time.

Weights are several times larger than transformers draws them, so that a part that is left out shows in the outputs. No
token ends a sequence, and nothing is dropped, so that outputs are functions of the inputs alone.
"""

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

VOCAB = 96
IDS = torch.arange(10).view(2, 5)

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_WORDS = {"vocab_size": VOCAB, "pad_token_id": 0}
_ENDLESS = {"bos_token_id": None, "eos_token_id": None}
_WIDE = {"initializer_range": 0.15}
_KEPT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_LLAMA = {**SIZES, **_WORDS, **_ENDLESS, **_WIDE, "num_key_value_heads": 2, "max_position_embeddings": 512}
_BERT = {**SIZES, **_WORDS, **_WIDE, **_KEPT, "max_position_embeddings": 128, "num_labels": 3}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
_MOE = {**_LLAMA, "num_experts_per_tok": 2}
_LOCAL = {**_MOE, "num_local_experts": 6}
_GROUPS = {"n_routed_experts": 6, "moe_intermediate_size": 24, "n_group": 1, "topk_group": 1}
_SHARED = {**_MOE, **_GROUPS, "n_shared_experts": 1, "first_k_dense_replace": 1}
_MLA = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
_MAMBA = {"n_groups": 1, "mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8}
# Models with experts: the head, the config and what that is given.
MOE_FAMILIES = {
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**_MOE, "num_experts": 6, "moe_intermediate_size": 24}),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {**_MOE, "num_experts": 6, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 16},
    ),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", _LOCAL),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", {**_LOCAL, "head_dim": 8, "layer_types": ["full_attention"] * 2}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", {**_SHARED, **_MLA, "num_key_value_heads": 4}),
    "glm4_moe": ("Glm4MoeForCausalLM", "Glm4MoeConfig", {**_SHARED, "head_dim": 8}),
    "llama4": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {**_LOCAL, "num_experts_per_tok": 1, "intermediate_size_mlp": 48, "head_dim": 8, "attention_chunk_size": 32},
    ),
    "olmoe": ("OlmoeForCausalLM", "OlmoeConfig", {**_MOE, "num_experts": 6}),
    "granite_moe": ("GraniteMoeForCausalLM", "GraniteMoeConfig", _LOCAL),
    "phimoe": ("PhimoeForCausalLM", "PhimoeConfig", _LOCAL),
    "nemotron_h": (
        "NemotronHForCausalLM",
        "NemotronHConfig",
        {
            **_MOE, **_GROUPS, **_MAMBA, "head_dim": 8, "moe_shared_expert_intermediate_size": 16,
            "layers_block_type": ["attention", "moe"],
        },
    ),
}  # fmt: skip
# The usual head of each family, its config and what that is given.
FAMILIES = {
    "bert": ("BertForSequenceClassification", "BertConfig", _BERT),
    "roberta": ("RobertaForTokenClassification", "RobertaConfig", _BERT),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _LLAMA),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _LLAMA),
    "mistral": ("MistralForCausalLM", "MistralConfig", _LLAMA),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {**_GPT2, **_WORDS, **_ENDLESS, **_WIDE, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    ),
    "t5": ("T5ForConditionalGeneration", "T5Config", {**_T5, **_WORDS, "eos_token_id": 1, "decoder_start_token_id": 0}),
    "vit": ("ViTForImageClassification", "ViTConfig", {**SIZES, **_WIDE, "image_size": 8, "patch_size": 4}),
}


def build(family: str, head: str | None = None, seed: int = 0, **settings) -> nn.Module:
    """A model of the family, in evaluation mode.

    Args:
        family: one of ``FAMILIES`` or ``MOE_FAMILIES``.
        head: the class; None is the family's usual one.
        seed: of its weights.
        settings: of its config, in place of the family's.
    """
    usual, config, common = (FAMILIES | MOE_FAMILIES)[family]
    config = getattr(transformers, config)(**{**common, **settings})
    torch.manual_seed(seed)
    return getattr(transformers, head or usual)(config).eval()


def llama(tied: bool = False, layers: int = 2, **settings) -> nn.Module:
    return build("llama", num_hidden_layers=layers, tie_word_embeddings=tied, **settings)


def llama_classifier() -> nn.Module:
    return build("llama", "LlamaForSequenceClassification", num_labels=3)


def gpt2(**settings) -> nn.Module:
    return build("gpt2", **settings)


def bert(**settings) -> nn.Module:
    return build("bert", **settings)


def bert_tokens() -> nn.Module:
    return build("bert", "BertForTokenClassification")


def roberta() -> nn.Module:
    return build("roberta")


def t5(**settings) -> nn.Module:
    return build("t5", **settings)


def qwen2_vl() -> tuple[nn.Module, dict[str, Tensor]]:
    """A model of text and images, and an input with one image of 2 by 2 patches."""
    text = {**SIZES, **_WIDE, "vocab_size": VOCAB, "num_key_value_heads": 2, "max_position_embeddings": 512}
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    image = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "in_channels": 3, **_WIDE}
    image |= {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 1}
    marks = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
    torch.manual_seed(0)
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=image, **marks)
    model = transformers.Qwen2VLForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    ids = torch.tensor([[5, 6, 92, 90, 90, 90, 90, 93, 7, 8, 9]])
    given = {"input_ids": ids, "mm_token_type_ids": (ids == 90).long(), "attention_mask": torch.ones_like(ids)}
    return model, {
        **given,
        "pixel_values": torch.linspace(-1, 1, 768).view(16, 48),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }


def prompts(rows: int, length: int = 7, seed: int = 0) -> Tensor:
    """Token ids ``[rows, length]`` without padding."""
    return torch.randint(1, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(model: nn.Module) -> Tensor:
    """What any of the models makes of its fixed input."""
    kind = type(model).__name__
    if "ViT" in kind:
        return model(pixel_values=torch.linspace(0, 2, 384).view(2, 3, 8, 8)).logits
    inputs = {"decoder_input_ids": IDS} if "T5" in kind else {}
    return model(input_ids=IDS, **inputs).logits


def close(actual: Tensor, expected: Tensor) -> bool:
    """float32: the same few hundred products, summed in another order."""
    return (actual - expected).abs().max() <= 64 * torch.finfo(torch.float32).eps * max(1, expected.abs().max())
