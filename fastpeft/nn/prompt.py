"""Learned prompts of a model, and how they come in front of its input."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._device import constant
from . import cache as caches
from .prompt_plan import Plan, Prefilled, as_integers, for_rows, nothing_for, tokens_of
from .rows import Called, RowAdapters, first_position

KEY = "fastpeft_prompt"  # where a cache or an encoder's output carries its Prefilled
# What has one entry for each token, and what a token that the caller did not write has there.
_PER_TOKEN = {"token_type_ids": 0, "mm_token_type_ids": 0}


class Prompts(RowAdapters):
    """Named prompts ``[P, D]``, trained in place of a text in front of the input.

    The outputs of whatever is called hold the prompt's positions: ``[B, P + T, ..]`` of a call with T tokens, the
    model's logits as well as its backbone's hidden states, as PEFT's model does it; the labels that the model is given
    are lengthened to match. What stands at the end of a row without padding are always the caller's tokens.

    Args:
        model: the transformers model; its forward's arguments are read.
        padding_side: of batches whose rows have different lengths: "right", "left", or None: the side of the input's
            own padding, else right where token labels are given or the model does not generate, and left where it does.
    """

    op, order = "PromptTuning", 0

    def __init__(self, model: nn.Module, padding_side: str | None = None):
        super().__init__()
        self.prompts = nn.ParameterDict()
        self.padding_side = padding_side
        config = getattr(model, "config", None)
        self.encodes = bool(getattr(config, "is_encoder_decoder", False))
        self.first = first_position(model)
        self.generates = bool(getattr(model, "can_generate", bool)()) and not self.encodes
        # Classifiers on decoders read the last position when they are given embeddings.
        self.reads_last = hasattr(model, "score") and type(model).__name__.endswith("ForSequenceClassification")

    @property
    def parts(self) -> nn.ParameterDict:
        return self.prompts

    def before(self, called: Called, given: dict, rows: Sequence[str | None] | None) -> dict:
        """The call's arguments with prompts in them; with a cache, only in the call that begins it."""
        if self.encodes and given.get("encoder_outputs") is not None:
            done = getattr(given["encoder_outputs"], KEY, None)
            return given if done is None else {**given, "attention_mask": for_rows(done.mask, given)}
        cache = None if self.encodes else caches.cache_of(given)
        done = None if cache is None else caches.found(cache, KEY)
        if done is not None:
            return self._continued(called, given, done, cache)
        if cache is not None and caches.begun(cache):
            return given  # while no prompt was active
        return self._prefilled(called, given, rows)

    def announce(self, given: dict, rows: Sequence[str | None] | None) -> dict:
        """The labels alone, and the mask that positions are counted by where the caller gives none."""
        tokens, cache = tokens_of(given), caches.cache_of(given)
        done = None if cache is None else caches.found(cache, KEY)
        if tokens is None:
            return given
        if done is not None:
            past = caches.tokens_in(cache)
            if given.get("attention_mask") is None and given.get("position_ids") is None and past is not None:
                # Without a mask the model would count the prompt among the tokens before.
                count = int(past) - done.mask.shape[1] + done.tokens + tokens.shape[1]
                given = {**given, "attention_mask": done.mask.new_ones(len(tokens), count)}
            return given
        plan = None if given.get("labels") is None else self._plan(given, rows)
        if plan is None or plan.labels is None:
            return given
        batch = plan.gather(inputs_embeds=nothing_for(tokens, plan.prompts[0]), labels=plan.labels)
        return {**given, "labels": self._unpredicted(batch, plan.side)}

    def after(self, called: Called, given: dict, output: Any) -> None:
        """Leave with the cache, or an encoder's output, what later calls need to know."""
        done, before = getattr(given.get("inputs_embeds"), KEY, None), caches.cache_of(given)
        if done is None and before is not None and not self.encodes:
            done = caches.found(before, KEY)
        # Some models hand back no cache: the one that they were given goes on.
        cache = output if self.encodes else caches.cache_of(output) or before
        if done is not None and cache is not None and not torch.compiler.is_compiling():
            caches.leave(cache, KEY, done)

    def _plan(self, given: dict, rows: Sequence[str | None] | None) -> Plan | None:
        """Which prompt goes where; None where no row has one."""
        tokens: Any = tokens_of(given)
        members = self.members(rows, tokens.shape[0])
        if not any(members):
            return None
        for name in ("start_positions", "end_positions"):
            if given.get(name) is not None:
                raise ValueError(f"{self.op}: {name} is given, expected None: prompts move every position")
        mask, labels = given.get("attention_mask"), given.get("labels")
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"{self.op}: attention_mask has shape {shape}, expected [B, T]")
        if labels is not None and (self.encodes or labels.shape != tokens.shape[:2] or labels.is_floating_point()):
            labels = None  # not one for each token of this input
        kinds = list(dict.fromkeys(member for member in members if member))
        prompts = [torch.cat([self.prompts[name] for name in kind]) for kind in kinds]
        places = [kinds.index(member) if member else None for member in members]
        if mask is not None:
            mask = as_integers(mask[:, : tokens.shape[1]])  # beyond is a static cache's room
        return Plan(prompts, places, mask, labels, self._side(mask, labels))

    def _prefilled(self, called: Called, given: dict, rows: Sequence[str | None] | None) -> dict:
        tokens = tokens_of(given)
        plan = None if tokens is None else self._plan(given, rows)
        if tokens is None or plan is None:
            return given  # where tokens are missing, the model says so itself
        positions: Tensor | None = given.get("position_ids")
        flat = positions if positions is None or positions.dim() == 2 else None
        batch = plan.gather(**self._source(called.module, given), labels=plan.labels, position_ids=flat)
        width, count = batch.attention_mask.shape[1], tokens.shape[1]
        sizes = plan.lengths
        alike = plan.mask is None and all(size == width - count for size in sizes)
        found = {**given, "input_ids": None, "inputs_embeds": batch.inputs_embeds}
        found["attention_mask"] = None if alike else batch.attention_mask
        if batch.labels is not None:
            found["labels"] = self._unpredicted(batch, plan.side)
        numbered = positions is not None or (not alike and plan.side == "left")
        if numbered and "position_ids" in called.arguments:
            first = self.first if positions is None else 0
            found["position_ids"] = batch.position_ids + first if first else batch.position_ids
            if positions is not None and flat is None:
                found["position_ids"] = plan.planes(tokens, positions)
        found.pop("cache_position", None)
        for name, fill in _PER_TOKEN.items():
            if given.get(name) is not None:
                padded = plan.gather(
                    inputs_embeds=nothing_for(tokens, plan.prompts[0]), labels=given[name], ignore_index=fill
                )
                found[name] = padded.labels
        if not torch.compiler.is_compiling():
            last = batch.position_ids.amax(1, keepdim=True) + 1
            lengths = constant(tuple(sizes), torch.int64, last.device)[:, None]
            setattr(batch.inputs_embeds, KEY, Prefilled(batch.attention_mask, last, lengths, count, alike))
        cache = None if self.encodes else caches.cache_of(given)
        if cache is not None:
            caches.make_room(cache, width - count, called.module)
            if found["attention_mask"] is not None and given.get("attention_mask") is not None:
                found["attention_mask"] = caches.padded_to(batch.attention_mask, cache, given["attention_mask"])
        return found

    def _unpredicted(self, batch: Any, side: str) -> Tensor:
        """The labels of a batch."""
        if self.generates and side == "left":
            # Nothing comes before a row's first token; a shifted loss would have padding predict it.
            return batch.labels.scatter(1, batch.attention_mask.argmax(1, keepdim=True), -100)
        return batch.labels

    def _continued(self, called: Called, given: dict, done: Prefilled, cache: Any) -> dict:
        """The arguments of a call that goes on where the cache ends, whose caller knows nothing of prompts."""
        tokens: Any = tokens_of(given)
        mask, before, new = given.get("attention_mask"), for_rows(done.mask, given), tokens.shape[1]
        if mask is not None and mask.dim() != 2:
            raise ValueError(f"{self.op}: attention_mask has shape {list(mask.shape)}, expected [B, T]")
        past = caches.tokens_in(cache)
        found = {**given}
        places = found.pop("cache_position", None)
        if places is not None and past is None:  # only the caller knows
            found["cache_position"] = places + before.shape[1] - done.tokens
        if mask is None and (past is None or (done.alike and given.get("position_ids") is None)):
            return found  # all that there is goes on from what the cache holds
        if mask is None:
            generated = before.new_ones(len(before), past + new - before.shape[1])
        else:
            end = None if past is None else done.tokens + past + new - before.shape[1]
            generated = mask[:, done.tokens : end]
        if mask is not None or not done.alike:
            found["attention_mask"] = torch.cat([before, generated.to(before.dtype)], 1)
        if mask is not None:
            found["attention_mask"] = caches.padded_to(found["attention_mask"], cache, mask)
        positions = given.get("position_ids")
        if "position_ids" not in called.arguments:
            return found
        if positions is not None and positions.dim() == 3:
            found["position_ids"] = positions + for_rows(done.lengths, given)
        elif past is not None:
            first = self.first if positions is None else 0
            start = for_rows(done.position, given) + first + past - before.shape[1]
            found["position_ids"] = start + torch.arange(new, device=start.device)
        return found

    def _source(self, module: Any, given: dict) -> dict:
        """Token ids with the embedding's weight where that is all the embedding does, else what it makes of them."""
        if given.get("inputs_embeds") is not None:
            return {"inputs_embeds": given["inputs_embeds"]}
        ids, embedding = given["input_ids"], module.get_input_embeddings()
        plain = type(embedding) is nn.Embedding and type(embedding.weight) is nn.Parameter
        hooks = embedding._forward_hooks or embedding._forward_pre_hooks or "forward" in embedding.__dict__
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
