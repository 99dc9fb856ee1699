"""Prompt tuning, as ``attach`` drives it: embeddings trained in place of a text in front of the input."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ... import _check, ops
from ...nn.prompt import Prompts
from ..formats.files import write_json, write_tensors
from ..formats.peft_files import CONFIG, WEIGHTS
from ..formats.peft_prompts import EMBEDDINGS, check_fields, fields_of, read_embeddings
from ..layer_report import LayerReport
from ..method import Method

CHILD = "fastpeft_prompt"  # the module that is added to the model
INITS = ("random", "vocabulary", "text")
SIDES = (None, "right", "left")


@dataclass(frozen=True, kw_only=True)
class PromptTuning:
    """Prompt tuning for ``fastpeft.attach`` (Lester et al., 2021). Names in [brackets] are PEFT's.

    Args:
        length: tokens of the prompt [num_virtual_tokens].
        init: "random", normal with the standard deviation of the model's embeddings; "vocabulary", embeddings of
            tokens drawn at random; "text", those of ``text``, repeated or cut to length [prompt_tuning_init].
        text: token ids, ``tokenizer("Classify this review:").input_ids``.
        dtype: of the prompt; None: float32 where the embeddings are 16 bits wide, else theirs.
        padding_side: of batches whose rows have prompts of different lengths. None: the side of the input's own
            padding; without any, right for token labels and for encoders, left where the last position is read.

    Raises:
        TypeError, ValueError: naming the argument, what it is and what was expected.
    """

    length: int = 20
    init: str = "random"
    text: Sequence[int] | None = None
    dtype: torch.dtype | None = None
    padding_side: str | None = None

    def __post_init__(self):
        _check.positive("PromptTuning", "length", self.length)
        if self.init not in INITS:
            raise ValueError(f"PromptTuning: init is {self.init!r}, expected one of {', '.join(INITS)}")
        if (self.init == "text") != (self.text is not None):
            expected = "token ids with init='text'" if self.init == "text" else "None without init='text'"
            raise ValueError(f"PromptTuning: text is {self.text!r}, expected {expected}")
        if self.text is not None:
            if isinstance(self.text, str) or not all(type(token) is int for token in self.text):
                raise TypeError(f"PromptTuning: text is {self.text!r}, expected token ids")
            if not self.text:
                raise ValueError("PromptTuning: text is empty, expected at least one token")
            object.__setattr__(self, "text", tuple(self.text))
        if self.dtype is not None and not self.dtype.is_floating_point:
            raise ValueError(f"PromptTuning: dtype is {self.dtype}, expected a floating-point dtype")
        if self.padding_side not in SIDES:
            raise ValueError(f"PromptTuning: padding_side is {self.padding_side!r}, expected None, 'right' or 'left'")


class PromptMethod(Method):
    name, config, title = "prompt", PromptTuning, "PromptTuning"
    unmergeable = "it is no term of a weight but a part of the input"

    def new_record(self) -> dict:
        return {}

    def resolve(self, op: str, model: nn.Module, config: PromptTuning, name: str, strict: bool = True) -> Any:
        embedding = embedding_of(op, "PromptTuning", model)
        if getattr(model, CHILD, None) is not None:
            if self.record(model) is None:
                raise ValueError(f"{op}: the model has a {CHILD} of its own, expected a model without")
            others = {other.padding_side for other in self.configs(model).values()}
            if config.padding_side not in others:
                raise ValueError(
                    f"{op}: padding_side is {config.padding_side!r}, expected {others.pop()!r} as the prompts before it"
                )
        if config.text is not None and not all(0 <= token < embedding.weight.shape[0] for token in config.text):
            raise ValueError(f"{op}: text holds a token outside of the vocabulary of {embedding.weight.shape[0]}")
        return config

    def apply(self, model: nn.Module, plan: PromptTuning, name: str) -> None:
        prompt = nn.Parameter(initial(model.get_input_embeddings().weight, plan), requires_grad=False)
        if getattr(model, CHILD, None) is None:
            prompts = Prompts(model, plan.padding_side)
            prompts.train(model.training)
            prompts.attach(model)
            model.add_module(CHILD, prompts)
        getattr(model, CHILD).prompts[name] = prompt

    def discard(self, model: nn.Module, name: str) -> None:
        prompts = getattr(model, CHILD, None)
        if prompts is not None and name in prompts.prompts:
            del prompts.prompts[name]
            prompts.active = tuple(other for other in prompts.active if other != name)
            if not prompts.names:
                self.remove(model)

    def remove(self, model: nn.Module, keep_merged: bool = False) -> None:
        prompts = getattr(model, CHILD, None)
        if prompts is not None:
            prompts.detach()
            delattr(model, CHILD)

    def set_active(self, model: nn.Module, names: Sequence[str], trainable: bool = True) -> None:
        prompts = getattr(model, CHILD)
        prompts.active = tuple(name for name in names if name in prompts.prompts)
        for name, prompt in prompts.prompts.items():
            prompt.requires_grad_(trainable and name in prompts.active)

    def disable(self, model: nn.Module) -> Callable[[], None]:
        return disable(getattr(model, CHILD))

    def parameters(self, model: nn.Module, name: str) -> dict[str, Tensor]:
        return {EMBEDDINGS: getattr(model, CHILD).prompts[name]}

    def expected(self, model: nn.Module, config: PromptTuning, plan: Any) -> dict[str, tuple[int, ...]]:
        return {EMBEDDINGS: (config.length, model.get_input_embeddings().weight.shape[1])}

    def recognises(self, fields: Mapping) -> bool:
        return fields.get("peft_type") == "PROMPT_TUNING"

    def read(self, op: str, model: nn.Module, directory: Path, fields: Mapping) -> tuple[Any, dict[str, Tensor]]:
        sides = {other.padding_side for other in self.configs(model).values()}
        config = PromptTuning(length=check_fields(op, fields), padding_side=sides.pop() if sides else None)
        return config, read_embeddings(op, directory)

    def write(self, op: str, model: nn.Module, name: str, tensors: dict[str, Tensor], directory: Path) -> None:
        length, columns = tensors[EMBEDDINGS].shape
        sizes = getattr(model.config, "get_text_config", lambda: model.config)()
        fields = fields_of(
            model,
            "PROMPT_TUNING",
            length,
            token_dim=columns,
            num_layers=getattr(sizes, "num_hidden_layers", None),
            num_attention_heads=getattr(sizes, "num_attention_heads", None),
            prompt_tuning_init="RANDOM",
        )
        write_tensors(op, directory / WEIGHTS, tensors)
        write_json(directory / CONFIG, fields)

    def report(self, model: nn.Module) -> Sequence[LayerReport]:
        prompts = getattr(model, CHILD)
        table, rows = model.get_input_embeddings().weight, list(prompts.prompts.values())
        backend = ops.explain("prompt_gather", rows, inputs_embeds=table[None, :0]).backend
        return [LayerReport(CHILD, "fused", backend, kind="prompts")]


def embedding_of(op: str, method: str, model: nn.Module) -> nn.Module:
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
    dtype = config.dtype or (torch.float32 if weight.dtype.itemsize <= 2 else weight.dtype)
    with torch.no_grad():
        if config.init == "random":
            std = weight.float().std().item() if not weight.is_meta else 1.0
            return torch.empty(config.length, weight.shape[1], dtype=dtype, device=weight.device).normal_(std=std)
        if config.init == "vocabulary":
            tokens = torch.randint(len(weight), (config.length,), device=weight.device)
        else:
            tokens = torch.tensor(config.text, device=weight.device).repeat(-(-config.length // len(config.text)))
        return weight[tokens[: config.length]].to(dtype, copy=True)


def disable(module: nn.Module) -> Callable[[], None]:
    """Have a module of adapters do nothing; returns what puts back the state it found."""
    before = module.disabled
    module.disabled = True

    def enable() -> None:
        module.disabled = before

    return enable
