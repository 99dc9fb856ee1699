"""The two ends of a Hugging Face model, where it says what they are."""

from torch import nn


def input_embeddings(model: nn.Module) -> nn.Module | None:
    """The module that embeds tokens, or None."""
    return _asked(model, "get_input_embeddings")


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """The head that predicts tokens, or None."""
    return _asked(model, "get_output_embeddings")


def _asked(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return getattr(model, name)()
    except (AttributeError, NotImplementedError):  # no such method, or what models without one raise
        return None
