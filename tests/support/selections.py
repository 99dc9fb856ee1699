"""Models for selective training, what to choose in them, and what training changed."""

import torch

from tests.support import models


# In training mode, with enough blocks to choose among.
def llama(tied=False, layers=6):
    return models.llama(tied, layers).train()


def bert():
    return models.build("bert", "BertModel", num_hidden_layers=4).train()


def gpt2():
    return models.gpt2(n_layer=4).train()


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


def names(selection) -> set[str]:
    return {name for name, _ in selection.named_parameters()}


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
