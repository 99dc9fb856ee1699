"""Prompt tuning, as ``attach`` drives it: embeddings trained in place of a text in front of the input."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...nn.backend import serving_backend
from ...nn.base_layer import trained_dtype
from ...nn.prompt import Prompts
from ..embeddings import token_table
from ..layer_report import LayerReport
from ..row_method import RowMethod
from .config import PromptTuning
from .files import PromptFiles


class PromptMethod(RowMethod):
    name, config, title, child = "prompt", PromptTuning, "PromptTuning", "fastpeft_prompt"
    unmergeable = "it is no term of a weight but a part of the input"

    def __init__(self):
        self.files = PromptFiles(self)

    def resolve(self, op: str, model: nn.Module, config: PromptTuning, name: str, strict: bool = True) -> PromptTuning:
        vocabulary = len(embedding_of(op, "PromptTuning", model).weight)
        self.refuse_own(op, model)
        others = {other.padding_side for other in self.configs(model).values()}
        if others and config.padding_side not in others:
            raise ValueError(
                f"{op}: padding_side is {config.padding_side!r}, expected {others.pop()!r} as the prompts before it"
            )
        if config.text is not None and not all(0 <= token < vocabulary for token in config.text):
            raise ValueError(f"{op}: text holds a token outside of the vocabulary of {vocabulary}")
        return config

    def apply(self, model: nn.Module, plan: PromptTuning, name: str) -> None:
        prompt = nn.Parameter(initial(token_table(model), plan), requires_grad=False)
        if not self.present(model):
            self.put_up(model, Prompts(model, plan.padding_side))
        self.adapters(model).put(name, prompt)

    def report(self, model: nn.Module) -> Sequence[LayerReport]:
        rows, table = list(self.adapters(model).parts.values()), token_table(model)
        backend = serving_backend("prompt_gather", rows, inputs_embeds=table[None, :0])
        return [LayerReport(self.child, "fused", backend, kind="prompts")]


def embedding_of(op: str, method: str, model: Any) -> Any:
    """The model's token embedding.

    Raises:
        TypeError: it has none, or no place for other embeddings.
    """
    arguments = inspect.signature(model.forward).parameters if isinstance(model, nn.Module) else ()
    if "inputs_embeds" not in arguments or not hasattr(model, "get_input_embeddings"):
        raise TypeError(
            f"{op}: {type(model).__name__} does not take inputs_embeds, expected for {method} a transformers model"
        )
    embedding = model.get_input_embeddings()
    if not isinstance(getattr(embedding, "weight", None), Tensor) or embedding.weight.dim() != 2:
        raise TypeError(f"{op}: {type(model).__name__} has no token embedding of shape [V, D]")
    return embedding


def initial(weight: Tensor, config: PromptTuning) -> Tensor:
    """A prompt's first values."""
    dtype = config.dtype or trained_dtype(weight.dtype)
    with torch.no_grad():
        if config.init == "random":
            std = weight.float().std().item() if not weight.is_meta else 1.0
            return torch.empty(config.length, weight.shape[1], dtype=dtype, device=weight.device).normal_(std=std)
        if config.init == "vocabulary":
            tokens = torch.randint(len(weight), (config.length,), device=weight.device)
        else:
            text = torch.tensor(config.text, device=weight.device)
            tokens = text.repeat(-(-config.length // len(text)))
        return weight[tokens[: config.length]].to(dtype, copy=True)
