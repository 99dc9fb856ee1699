"""Small models and adapters for the tests against AdapterHub's library, which has an environment of its own."""

import pytest
import torch

adapters = pytest.importorskip("adapters", reason="adapters is not installed: make test-adapters")
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
PRESETS = {
    "seq_bn": lambda: adapters.SeqBnConfig(reduction_factor=4),
    "double_seq_bn": lambda: adapters.DoubleSeqBnConfig(reduction_factor=4),
    "par_bn": lambda: adapters.ParBnConfig(),
}


def bottleneck(**settings):
    """A config with adapters after attention and MLP."""
    common = {"mh_adapter": True, "output_adapter": True, "reduction_factor": 4, "non_linearity": "relu"}
    return adapters.BnConfig(**{**common, **settings})


FORMS = {
    "norms and gate": lambda: bottleneck(ln_before=True, ln_after=True, use_gating=True, scaling="learned"),
    "norm after the residual": lambda: bottleneck(
        ln_after=True, adapter_residual_before_ln=True, scaling="channel", original_ln_before=True
    ),
    "residual after the norm": lambda: bottleneck(residual_before_ln=False, original_ln_before=True),
    "residual between": lambda: bottleneck(residual_before_ln="post_add", original_ln_before=True),
    "parallel with norms": lambda: bottleneck(
        is_parallel=True, ln_after=True, ln_before=True, scaling=2.0, use_gating=True
    ),
    "without the norm after": lambda: bottleneck(
        original_ln_after=False, original_ln_before=True, residual_before_ln=False, scaling="channel"
    ),
    "its own norm after instead": lambda: bottleneck(
        original_ln_after=False,
        original_ln_before=True,
        residual_before_ln=False,
        ln_after=True,
        adapter_residual_before_ln=True,
    ),
    "cross and left out": lambda: bottleneck(cross_adapter=True, leave_out=[1], non_linearity="gelu_new"),
    "widths by layer": lambda: bottleneck(reduction_factor={"1": 3, "default": 8}, non_linearity="leakyrelu"),
}
# What the library itself cannot do: it has no residual between where norms come before, and Qwen2 is hooked.
IMPOSSIBLE = {(name, "residual between") for name in MODELS if name != "bert"} | {
    ("qwen2", "without the norm after"),
    ("qwen2", "its own norm after instead"),
}


def build(name: str) -> torch.nn.Module:
    """The same small model each time."""
    kind, config, settings = MODELS[name]
    torch.manual_seed(0)
    return getattr(transformers, kind)(getattr(transformers, config)(**settings, attn_implementation="eager")).eval()


def theirs(name: str, config) -> torch.nn.Module:
    """A model of the library whose adapter "a" acts, every parameter of it moved."""
    model = build(name)
    adapters.init(model)
    model.add_adapter("a", config=config)
    model.train_adapter("a")
    torch.manual_seed(3)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "adapters.a." in path:
                parameter.add_(torch.randn(parameter.shape) / 3)
    return model.eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    kind = type(model).__name__
    if "ViT" in kind:
        return model(pixel_values=torch.linspace(0, 2, 384).view(2, 3, 8, 8)).logits
    inputs = {"decoder_input_ids": IDS} if "T5" in kind else {}
    return model(input_ids=IDS, **inputs).logits


def close(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """float32: the same few hundred products, summed in another order."""
    return (actual - expected).abs().max() <= 64 * torch.finfo(torch.float32).eps * max(1, expected.abs().max())
