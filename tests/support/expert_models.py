"""Small models with experts: the names of their weights, and when two results are the same."""

import torch
from torch import nn

import fastpeft
from fastpeft.nn.lora_experts import LoraExperts
from tests.support.models import VOCAB

IDS = torch.randint(1, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))


def parameters_of(family):
    """The weights of experts, as PEFT's target_parameters name them."""
    return ["experts.up_proj" if family == "nemotron_h" else "experts.gate_up_proj", "experts.down_proj"]


def close(found, wanted, terms=1 << 10):
    """As many products as a value of these models is a sum of, in float32 and in another order."""
    limit = terms**0.5 * torch.finfo(torch.float32).eps * max(1.0, wanted.abs().max().item())
    return (found - wanted).abs().max() <= 4 * limit


def loss_of(model):
    return model(input_ids=IDS, labels=IDS).loss


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, LoraExperts)]


def gradients_of(model):
    """The gradients of the adapter, by the keys that its checkpoints have."""
    grads = {p.data_ptr(): p.grad for p in model.parameters() if p.requires_grad}
    return {key: grads[tensor.data_ptr()] for key, tensor in fastpeft.methods.adapter_state_dict(model).items()}


def curve_of(model, steps=10):
    """Losses of some steps of training, the same random numbers in each."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-3)
    losses = []
    for step in range(steps):
        torch.manual_seed(step)  # Phi's router is noisy
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


class _Apart(nn.ModuleList):
    """Experts as they were before transformers 5: a module each, whose layers have names of their own."""

    def __init__(self, stacked, names):
        super().__init__(_expert(stacked, e, names) for e in range(len(stacked.down_proj)))
        self.activation, self.names = [stacked.act_fn], names  # in a list it is no module of this one

    def forward(self, x, index, weights):
        y = torch.zeros_like(x)
        for e, expert in enumerate(self):
            token, choice = (index == e).nonzero().unbind(1)
            *ups, down = (expert[name] for name in self.names)
            h = self.activation[0](ups[0](x[token]))
            h = down(h * ups[1](x[token]) if len(ups) == 2 else h)
            y = y.index_add(0, token, h * weights[token, choice, None])
        return y


def _expert(stacked, e, names):
    up = stacked.gate_up_proj[e].chunk(2) if len(names) == 3 else [stacked.up_proj[e]]
    layers = nn.ModuleDict()
    for name, weight in zip(names, [*up, stacked.down_proj[e]], strict=True):
        layers[name] = nn.Linear(*reversed(weight.shape), bias=False)
        layers[name].weight = nn.Parameter(weight.detach().clone())
    return layers


def with_experts_apart(model, names):
    """The same model with a module for each expert, under another name for PEFT, which would take it for a new one."""
    for module in list(model.modules()):
        if "experts" in module._modules and not isinstance(module.experts, nn.ModuleList):
            module.experts = _Apart(module.experts, names)
    model.config.model_type = "older"
    return model
