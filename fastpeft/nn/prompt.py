"""Learned prompts of a model, and the hooks that put them in front of its input."""

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops import prompt_gather
from .rows import RowAdapters

OP = "PromptTuning"
KEY = "fastpeft_prompt"  # where a cache or an encoder's output carries its Prefilled
# What has one entry for each token, and what a token that the caller did not write has there.
_PER_TOKEN = {"token_type_ids": 0}


class Prefilled(NamedTuple):
    """What later calls must know of the call that put the prompts in: mask [B, W], next position [B, 1], T."""

    mask: Tensor
    position: Tensor
    tokens: int


class Prompts(RowAdapters):
    """Named prompts ``[P, D]``, trained in place of a text in front of the input.

    Args:
        model: the transformers model; its forward's arguments are read.
        padding_side: of batches whose rows have different lengths: "right", "left", or None: the side of the input's
            own padding, else right where token labels are given or the model does not generate, and left where it does.
    """

    def __init__(self, model: nn.Module, padding_side: str | None = None):
        super().__init__()
        self.prompts = nn.ParameterDict()
        self.padding_side = padding_side
        self.arguments = tuple(inspect.signature(model.forward).parameters)
        config = getattr(model, "config", None)
        self.encodes = bool(getattr(config, "is_encoder_decoder", False))
        # Where positions count from the padding token's, as RoBERTa's do, only the model itself can number them.
        shifted = any(hasattr(m, "create_position_ids_from_inputs_embeds") for m in model.modules())
        self.positions = "position_ids" in self.arguments and not shifted
        self.generates = bool(getattr(model, "can_generate", bool)()) and not self.encodes and not shifted
        # Classifiers on decoders read the last position when they are given embeddings.
        self.reads_last = hasattr(model, "score") and type(model).__name__.endswith("ForSequenceClassification")

    @property
    def parts(self) -> nn.ParameterDict:
        return self.prompts

    def attach(self, model: Any) -> None:
        """Hook into the model; an encoder-decoder's generation calls the encoder by itself."""
        self.handles = [
            model.register_forward_pre_hook(self.before, with_kwargs=True),
            model.register_forward_hook(self.after, with_kwargs=True),
        ]
        if self.encodes:
            encoder = model.get_encoder()
            self.handles += [
                encoder.register_forward_pre_hook(self.before_encoder, with_kwargs=True),
                encoder.register_forward_hook(self.after, with_kwargs=True),
            ]

    def before(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """The model's arguments with prompts in them; with a cache, only in the call that begins it."""
        given = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        names = self.take(OP, model, given)
        if self.encodes and given.get("encoder_outputs") is not None:
            done = getattr(given["encoder_outputs"], KEY, None)
            return (), given if done is None else {**given, "attention_mask": _repeat(done.mask, given)}
        cache: Any = given.get("past_key_values")
        if not self.encodes and hasattr(cache, "get_seq_length") and cache.get_seq_length() > 0:
            done = getattr(cache, KEY, None)
            return (), given if done is None else self._continued(given, done, cache.get_seq_length())
        return (), self._prefilled(model, given, names)

    def before_encoder(self, encoder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """The same for an encoder that is called without its model."""
        given = {**dict(zip(inspect.signature(encoder.forward).parameters, args, strict=False)), **kwargs}
        if hasattr(given.get("inputs_embeds"), KEY):
            return None
        return (), self._prefilled(encoder, given, None)

    def after(self, model: nn.Module, args: tuple, kwargs: dict, output):
        """Leave with the cache, or an encoder's output, what later calls need to know."""
        done = getattr(kwargs.get("inputs_embeds"), KEY, None)
        cache = getattr(output, "past_key_values", None) if not self.encodes else output
        if done is not None and cache is not None and not torch.compiler.is_compiling():
            setattr(cache, KEY, done)

    def _prefilled(self, model: nn.Module, given: dict, names) -> dict:
        x = given.get("inputs_embeds")
        tokens = given.get("input_ids") if x is None else x
        if not isinstance(tokens, Tensor):
            return given  # the model says itself what is missing
        members = self.members(OP, names, tokens.shape[0])
        if not any(members):
            return given
        for name in ("start_positions", "end_positions"):
            if given.get(name) is not None:
                raise ValueError(f"{OP}: {name} is given, expected None: prompts move every position")
        mask, labels = given.get("attention_mask"), given.get("labels")
        if mask is not None and mask.dim() != 2:
            raise ValueError(f"{OP}: attention_mask has shape {list(mask.shape)}, expected [B, T]")
        if labels is not None and (self.encodes or labels.shape != tokens.shape[:2] or labels.is_floating_point()):
            labels = None  # not one for each token of this input
        kinds = list(dict.fromkeys(member for member in members if member))
        prompts = [torch.cat([self.prompts[name] for name in kind]) for kind in kinds]
        rows = [kinds.index(member) if member else None for member in members]
        source = self._source(model, given)
        options: dict[str, Any] = {"attention_mask": _integer(mask), "padding_side": self._side(mask, labels)}
        batch = prompt_gather(prompts, rows, **source, labels=labels, position_ids=given.get("position_ids"), **options)
        width, count = batch.attention_mask.shape[1], tokens.shape[1]
        alike = mask is None and all(len(prompts[row]) == width - count if row is not None else False for row in rows)
        found = {**given, "input_ids": None, "inputs_embeds": batch.inputs_embeds}
        found["attention_mask"] = None if alike else batch.attention_mask
        if batch.labels is not None:
            found["labels"] = batch.labels
            if self.generates and options["padding_side"] == "left":
                # Nothing comes before a row's first token; a shifted loss would have padding predict it.
                found["labels"] = batch.labels.scatter(1, batch.attention_mask.argmax(1, keepdim=True), -100)
        numbered = given.get("position_ids") is not None or (not alike and options["padding_side"] == "left")
        if numbered and self.positions:
            found["position_ids"] = batch.position_ids
        found.pop("cache_position", None)
        for name, fill in _PER_TOKEN.items():
            if given.get(name) is not None:
                nothing = batch.inputs_embeds.new_empty(*tokens.shape[:2], 0)
                empty = [prompt.new_empty(len(prompt), 0) for prompt in prompts]
                padded = prompt_gather(
                    empty, rows, inputs_embeds=nothing, labels=given[name], ignore_index=fill, **options
                )
                found[name] = padded.labels
        if not torch.compiler.is_compiling():
            last = batch.position_ids.amax(1, keepdim=True) + 1
            setattr(batch.inputs_embeds, KEY, Prefilled(batch.attention_mask, last, count))
        return found

    def _continued(self, given: dict, done: Prefilled, past: int) -> dict:
        """The arguments of a call that goes on where the cache ends, whose caller knows nothing of prompts."""
        tokens: Any = given.get("input_ids") if given.get("inputs_embeds") is None else given["inputs_embeds"]
        mask, before, new = given.get("attention_mask"), _repeat(done.mask, given), tokens.shape[1]
        if mask is not None and mask.dim() != 2:
            raise ValueError(f"{OP}: attention_mask has shape {list(mask.shape)}, expected [B, T]")
        generated = (
            before.new_ones(len(before), past + new - before.shape[1]) if mask is None else mask[:, done.tokens :]
        )
        found = {**given, "attention_mask": torch.cat([before, generated.to(before.dtype)], 1)}
        found.pop("cache_position", None)
        if self.positions:
            start = _repeat(done.position, given) + past - before.shape[1]
            found["position_ids"] = start + torch.arange(new, device=start.device)
        return found

    def _source(self, model: Any, given: dict) -> dict:
        """Token ids with the embedding's weight where that is all the embedding does, else what it makes of them."""
        if given.get("inputs_embeds") is not None:
            return {"inputs_embeds": given["inputs_embeds"]}
        ids, embedding = given["input_ids"], model.get_input_embeddings()
        plain = type(embedding) is nn.Embedding and type(embedding.weight) is nn.Parameter
        hooks = embedding._forward_hooks or embedding._forward_pre_hooks
        if plain and not hooks and embedding.max_norm is None:
            return {"input_ids": ids, "embedding": embedding.weight}
        return {"inputs_embeds": embedding(ids)}

    def _side(self, mask: Tensor | None, labels: Tensor | None) -> str:
        if self.padding_side is not None:
            return self.padding_side
        if self.reads_last:
            return "left"
        if not self.generates:
            return "right"
        if mask is not None and mask.shape[1]:
            ends = (mask[:, [0, -1]] == 0).any(0).tolist()
            if any(ends):
                return "left" if ends[0] else "right"
        return "right" if labels is not None else "left"

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: {len(prompt)}" for name, prompt in self.prompts.items())


def _integer(mask: Tensor | None) -> Tensor | None:
    """Masks of floats, which some tokenizers' users pass, as integers."""
    return mask.long() if mask is not None and mask.is_floating_point() else mask


def _repeat(rows: Tensor, given: dict) -> Tensor:
    """One entry for each row of the batch, which beam search may have repeated since."""
    shaped = (
        given.get(n) for n in ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds", "labels")
    )
    batch = next((len(value) for value in shaped if value is not None), len(rows))
    return rows if batch == len(rows) else rows.repeat_interleave(batch // len(rows), 0)
