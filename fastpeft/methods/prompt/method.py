"""Prompt tuning, as ``attach`` drives it: embeddings trained in place of a text in front of the input."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...nn.backend import serving_backend
from ...nn.base_layer import trained_dtype
from ...nn.cache import masks_later
from ...nn.prompt import Prompts
from ..embeddings import execution_device, token_table
from ..layer_report import LayerReport
from ..row_method import RowMethod
from .config import PromptTuning
from .files import PromptFiles
from .reasons import embedding_of, refuse_unsuited

MASKS = "create_masks_for_generate"  # what generate asks a model for where its cache has a fixed size


class PromptMethod(RowMethod):
    name, config, title, child = "prompt", PromptTuning, "PromptTuning", "fastpeft_prompt"
    unmergeable = "it is no term of a weight but a part of the input"

    def __init__(self):
        self.files = PromptFiles(self)

    def resolve(self, op: str, model: nn.Module, config: PromptTuning, name: str, strict: bool = True) -> PromptTuning:
        vocabulary = len(embedding_of(op, "PromptTuning", model).weight)
        refuse_unsuited(op, model)
        self.refuse_own(op, model)
        others = {other.padding_side for other in self.configs(model).values()}
        if others and config.padding_side not in others:
            raise ValueError(
                f"{op}: padding_side is {config.padding_side!r}, expected {others.pop()!r} as the prompts before it"
            )
        if config.text is not None and not all(0 <= token < vocabulary for token in config.text):
            raise ValueError(f"{op}: text holds a token outside of the vocabulary of {vocabulary}")
        return config

    def apply(self, model: Any, plan: PromptTuning, name: str) -> None:
        prompt = nn.Parameter(initial(model.get_input_embeddings(), plan), requires_grad=False)
        if not self.present(model):
            self.put_up(model, Prompts(model, plan.padding_side))
            if MASKS not in vars(model) and makes_masks(model):
                setattr(model, MASKS, masks_later)
        self.adapters(model).put(name, prompt)

    def remove(self, model: nn.Module, keep_merged: bool = False) -> None:
        super().remove(model, keep_merged)
        if vars(model).get(MASKS) is masks_later:
            delattr(model, MASKS)

    def report(self, model: nn.Module) -> Sequence[LayerReport]:
        rows, table = list(self.adapters(model).parts.values()), token_table(model)
        backend = serving_backend("prompt_gather", rows, inputs_embeds=table[None, :0])
        return [LayerReport(self.child, "fused", backend, kind="prompts")]


def makes_masks(model: nn.Module) -> bool:
    """Whether ``generate`` has the model's masks made for its tokens alone, where the cache has a fixed size."""
    own = getattr(getattr(type(model), MASKS, None), "__code__", None)
    return own is None or any(name.startswith("create_") for name in own.co_names)


def initial(embedding: Any, config: PromptTuning) -> Tensor:
    """A prompt's first values, where the token embedding computes."""
    weight, device = embedding.weight, execution_device(embedding)
    dtype = config.dtype or trained_dtype(weight.dtype)
    with torch.no_grad():
        if config.init == "random":
            empty = torch.empty(config.length, weight.shape[1], dtype=dtype, device=device)
            return empty.normal_(std=_deviation(embedding, device))
        if config.init == "vocabulary":
            tokens = torch.randint(len(weight), (config.length,), device=device)
        else:
            text = torch.tensor(config.text, device=device)
            tokens = text.repeat(-(-config.length // len(text)))
        return embedding(tokens[: config.length]).to(dtype, copy=True)


def _deviation(embedding: Any, device: torch.device) -> float:
    weight = embedding.weight
    if weight.is_meta and device.type != "meta":  # offloaded: of what its hook brings for some tokens
        weight = embedding(torch.arange(min(len(weight), 4096), device=device))
    return weight.float().std().item() if not weight.is_meta else 1.0
