"""The prompt config: how many tokens, and how they start. Checked when it is made."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ... import _check

INITS = ("random", "vocabulary", "text")
SIDES = (None, "right", "left")


@dataclass(frozen=True, kw_only=True)
class PromptTuning:
    """Prompt tuning for ``fastpeft.attach``: embeddings ``[P, D]`` trained in place of a text in front of the input.

    The prompt comes in once a sequence, wherever the model is called: itself, its ``forward``, or its backbone. Logits
    and the backbone's hidden states hold its positions, ``[B, P + T, ..]``, as PEFT's do; labels are lengthened to
    match.

    Source: Lester et al., "The Power of Scale for Parameter-Efficient Prompt Tuning" (2021). Names in [brackets] are
    PEFT's.

    Args:
        length: P, the tokens of the prompt, at least 1 [num_virtual_tokens].
        init: How it starts [prompt_tuning_init]. "random" is normal with the standard deviation of the model's
            embeddings; "vocabulary" takes embeddings of tokens drawn at random; "text" those of ``text``, repeated or
            cut to ``length``.
        text: Token ids, as ``tokenizer("Classify this review:").input_ids``, with ``init="text"`` alone.
        dtype: The prompt's dtype; None is float32 where the embeddings are 16 bits wide, else theirs.
        padding_side: Where rows of a batch that have prompts of different lengths are padded: "right" or "left". None
            is the side of the input's own padding; without any, right for token labels and for encoders, left where
            the last position is read.

    Raises:
        TypeError: ``text`` is no list of integers, or ``dtype`` no floating-point dtype.
        ValueError: An argument has a value that it may not have; the error names it and what was expected.
    """

    length: int = 20
    init: str = "random"
    text: Sequence[int] | None = None
    dtype: torch.dtype | None = None
    padding_side: str | None = None

    def __post_init__(self):
        check_tokens(self, INITS)
        if self.text is not None and not self.text:
            raise ValueError("PromptTuning: text is empty, expected at least one token")
        _check.one_of("PromptTuning", "padding_side", self.padding_side, SIDES)


def check_tokens(config, inits: Sequence[str]) -> None:
    """Check the fields that a prompt's and a prefix's config have in common, and make them plain."""
    op = type(config).__name__
    object.__setattr__(config, "length", _check.positive(op, "length", config.length))
    _check.one_of(op, "init", config.init, inits)
    _check.dtype_or_none(op, "dtype", config.dtype)
    if (config.init == "text") != (config.text is not None):
        expected = "token ids with init='text'" if config.init == "text" else "None without init='text'"
        raise ValueError(f"{op}: text is {_check.shown(config.text)}, expected {expected}")
    if config.text is not None:
        object.__setattr__(config, "text", _check.integers(op, "text", config.text))
