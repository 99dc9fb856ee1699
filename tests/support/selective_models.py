"""Models for selective training, what to choose in them, and what a training step changed."""

import torch
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}


def llama(layers=6, tied=False) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, num_hidden_layers=layers, num_key_value_heads=1, tie_word_embeddings=tied)
    return LlamaForCausalLM(config)


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(**SIZES, num_hidden_layers=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return BertModel(config, add_pooling_layer=False)


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_head=2, n_layer=4, n_positions=32, **dropout))


IDS = torch.arange(2, 34).view(2, 16)


def loss_of(model):
    out = model(input_ids=IDS)
    return (out.logits if hasattr(out, "logits") else out.last_hidden_state).square().mean()


def train(model, selection, steps=3):
    optimizer = torch.optim.AdamW(selection.param_groups(lr=1e-2))
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(model, before) -> set[str]:
    return {
        name for name, value in model.state_dict().items() if name not in before or not torch.equal(value, before[name])
    }


WHAT = {
    "last 2": {"layers": "last:2"},
    "first": {"layers": "first:1"},
    "numbers": {"layers": [0, -1]},
    "range": {"layers": "1:3", "params": "norm"},
    "bitfit": {"params": ["bias"], "add_missing_bias": True},
    "norms": {"params": "norm"},
    "module": {"modules": "lm_head"},
    "tokens": {"tokens": [3, 7]},
    "rows": {"rows": {"up_proj": 0.1, r".*\.1\.mlp\.gate_proj": [0, 5]}},
    "columns": {"columns": {"down_proj": [0, 1]}, "layers": "last:3"},
    "all": {"params": ["bias", "norm"], "tokens": [3], "rows": {"q_proj": 0.2}, "add_missing_bias": True, "layers": 4},
}
