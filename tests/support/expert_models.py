"""Small models with experts: the names of their weights, and when two results are the same."""

import torch

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
