"""The two ends of a Hugging Face model, where it says what they are."""

from typing import Any, cast

import torch
from torch import Tensor, nn


def input_embeddings(model: nn.Module) -> nn.Module | None:
    """The module that embeds tokens, or None."""
    return _asked(model, "get_input_embeddings")


def token_table(model: nn.Module) -> Tensor:
    """The weight ``[V, D]`` of the module that embeds tokens, in a model that has one."""
    return cast(Any, model).get_input_embeddings().weight


def execution_device(module: nn.Module) -> torch.device:
    """Where a module computes: the device of its weights, or where accelerate's hook brings them for each call."""
    device = next(module.parameters()).device
    hook = getattr(module, "_hf_hook", None)
    if device.type != "meta" or hook is None:
        return device
    hooks = getattr(hook, "hooks", (hook,))
    found = next((h.execution_device for h in hooks if getattr(h, "execution_device", None) is not None), device)
    return torch.device(found)


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """The head that predicts tokens, or None."""
    return _asked(model, "get_output_embeddings")


def _asked(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return getattr(model, name)()
    except (AttributeError, NotImplementedError):  # no such method, or what models without one raise
        return None


def tied_to_embeddings(model: nn.Module) -> tuple[str, ...]:
    """Paths of the modules whose weight is that of the input embedding, without the embedding itself."""
    table = input_embeddings(model)
    weight = getattr(table, "weight", None)
    if weight is None:
        return ()
    return tuple(p for p, m in model.named_modules() if m is not table and getattr(m, "weight", None) is weight)
