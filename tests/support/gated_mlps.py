"""Models with gated MLPs, PEFT's adapters on them, and what a step of theirs gives."""

import pytest
import torch
from torch import nn

import fastpeft
from fastpeft.nn import LoraMlp
from tests.support.models import IDS, SIZES, VOCAB, transformers

peft = pytest.importorskip("peft", reason="peft is not installed")

_HEADS = {"vocab_size": VOCAB, "num_key_value_heads": 2, "initializer_range": 0.15, "pad_token_id": 0}
FAMILIES = {
    "llama": ("Llama", {"mlp_bias": True}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "mistral": ("Mistral", {}),
    "gemma": ("Gemma", {"head_dim": 8}),
    "gemma, erf": ("Gemma", {"head_dim": 8}),
}


def base(family="llama", **changes):
    name, values = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **_HEADS, **values, **changes})
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).train()
    for layer in model.model.layers if family == "gemma, erf" else ():
        layer.mlp.act_fn = nn.GELU()
    return model


def adapted(model, dropout=0.0, **options):
    config = peft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=dropout, init_lora_weights=False, **options)
    torch.manual_seed(1)
    return peft.get_peft_model(model, config).train()


def results(model):
    torch.manual_seed(2)
    found = model(input_ids=IDS, labels=IDS)
    if found.loss.requires_grad:
        found.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return {"logits": found.logits.detach(), **grads}


def mlps(model):
    return [module for module in model.modules() if isinstance(module, LoraMlp)]


def rows(model):
    return [row for row in fastpeft.report(model) if row.kind == "gated MLPs"]
