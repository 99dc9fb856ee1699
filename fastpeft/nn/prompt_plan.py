"""Which prompt each row of a batch is given, and what later calls must know of it."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops import prompt_gather


class Prefilled(NamedTuple):
    """What later calls must know of the call that put the prompts in.

    Attributes:
        mask: ``[B, W]``, of prompts and tokens.
        position: ``[B, 1]``, the next one.
        lengths: ``[B, 1]``, of the rows' prompts.
        tokens: T, as the caller counts them.
        alike: whether all rows are of one length, so that no mask was needed.
    """

    mask: Tensor
    position: Tensor
    lengths: Tensor
    tokens: int
    alike: bool


class Plan(NamedTuple):
    """The prompts of a batch, and which of them each row has; the tokens' mask and labels; the side of padding."""

    prompts: list[Tensor]
    rows: list[int | None]
    mask: Tensor | None
    labels: Tensor | None
    side: str

    @property
    def lengths(self) -> list[int]:
        """Of each row's prompt."""
        return [0 if row is None else len(self.prompts[row]) for row in self.rows]

    def gather(self, **operands: Any) -> Any:
        """``prompt_gather`` of these prompts, or of none as wide, where the operands are of no width."""
        prompts = self.prompts
        if "inputs_embeds" in operands and operands["inputs_embeds"].shape[-1] == 0:
            prompts = [prompt.new_empty(len(prompt), 0) for prompt in prompts]
        return prompt_gather(prompts, self.rows, attention_mask=self.mask, padding_side=self.side, **operands)

    def planes(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Positions of several rows, ``[3, B, T]`` of time, height and width: each of them counts the prompt."""
        nothing = nothing_for(tokens, self.prompts[0])
        return torch.stack([self.gather(inputs_embeds=nothing, position_ids=p).position_ids for p in positions])


def tokens_of(given: dict) -> Tensor | None:
    """What the call embeds: ids ``[B, T]`` or embeddings ``[B, T, D]``."""
    tokens = given.get("input_ids") if given.get("inputs_embeds") is None else given["inputs_embeds"]
    return tokens if isinstance(tokens, Tensor) else None


def nothing_for(tokens: Tensor, like: Tensor) -> Tensor:
    """Embeddings of no width, where only masks, positions or labels are asked for."""
    return like.new_empty(*tokens.shape[:2], 0, device=tokens.device)


def as_integers(mask: Tensor | None) -> Tensor | None:
    """Masks of floats, which some tokenizers' users pass, as integers."""
    return mask.long() if mask is not None and mask.is_floating_point() else mask


def for_rows(rows: Tensor, given: dict) -> Tensor:
    """One entry for each row of the batch, which beam search may have repeated since."""
    shaped = (
        given.get(n) for n in ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds", "labels")
    )
    batch = next((len(value) for value in shaped if value is not None), len(rows))
    return rows if batch == len(rows) else rows.repeat_interleave(batch // len(rows), 0)
