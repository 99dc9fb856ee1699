"""A small model of each family that bottleneck adapters know, from a config, the same each time."""

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

IDS = torch.arange(10).view(2, 5)
SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
GPT2 = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "bos_token_id": 1}
T5 = {"vocab_size": 50, "d_model": 16, "d_ff": 32, "num_layers": 2, "num_heads": 2, "d_kv": 8}
VIT = {**SIZES, "image_size": 8, "patch_size": 4}
MODELS = {
    "bert": ("BertForSequenceClassification", "BertConfig", SIZES),
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**SIZES, "num_key_value_heads": 2}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {**SIZES, "num_key_value_heads": 2}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**SIZES, "num_key_value_heads": 2}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {**GPT2, "eos_token_id": 2}),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
    "vit": ("ViTForImageClassification", "ViTConfig", {key: VIT[key] for key in VIT if key != "vocab_size"}),
}


def build(name: str) -> torch.nn.Module:
    """The same small model each time."""
    kind, config, settings = MODELS[name]
    torch.manual_seed(0)
    return getattr(transformers, kind)(getattr(transformers, config)(**settings, attn_implementation="eager")).eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    kind = type(model).__name__
    if "ViT" in kind:
        return model(pixel_values=torch.linspace(0, 2, 384).view(2, 3, 8, 8)).logits
    inputs = {"decoder_input_ids": IDS} if "T5" in kind else {}
    return model(input_ids=IDS, **inputs).logits


def close(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """float32: the same few hundred products, summed in another order."""
    return (actual - expected).abs().max() <= 64 * torch.finfo(torch.float32).eps * max(1, expected.abs().max())
