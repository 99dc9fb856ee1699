"""The prefix config: how long, made how, and how it starts. Checked when it is made."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ... import _check
from ..prompt.config import check_tokens

INITS = ("random", "zero", "text")


@dataclass(frozen=True, kw_only=True)
class PrefixTuning:
    """Prefix tuning for ``fastpeft.attach``: keys and values trained in front of every layer's own.

    In a layer that attends to a window of W tokens a prefix is part of the window, as in PEFT: the token at position t
    of its row sees the keys i of the prefix with ``P + t - i < W``. Unlike PEFT's, positions do not count a row's
    padding in front, so that a row has what it would have alone.

    Source: Li & Liang, "Prefix-Tuning: Optimizing Continuous Prompts for Generation" (2021). Names in [brackets] are
    PEFT's.

    Args:
        length: P, the tokens of the prefix, at least 1 [num_virtual_tokens].
        projection: The hidden units of an MLP that makes the keys and values; None trains them themselves
            [prefix_projection, encoder_hidden_size].
        init: How it starts. "random" is normal with standard deviation 1; "zero" keys and values still take their share
            of the attention [init_weights]; "text" is what the model's cache holds after ``text``, so that it starts as
            if the text stood in front of the input.
        text: ``length`` token ids, with ``init="text"`` alone, for a model that generates and without ``projection``.
        dtype: The parameters' dtype; None is float32 where the model is 16 bits wide, else the model's.

    Raises:
        TypeError: ``text`` is no list of integers, or ``dtype`` no floating-point dtype.
        ValueError: An argument has a value that it may not have; the error names it and what was expected.
    """

    length: int = 20
    projection: int | None = None
    init: str = "random"
    text: Sequence[int] | None = None
    dtype: torch.dtype | None = None

    def __post_init__(self):
        check_tokens(self, INITS)
        if self.projection is not None:
            object.__setattr__(self, "projection", _check.positive("PrefixTuning", "projection", self.projection))
        if self.text is not None:
            if len(self.text) != self.length:
                raise ValueError(f"PrefixTuning: text has {len(self.text)} tokens, expected length={self.length}")
            if self.projection is not None:
                raise ValueError("PrefixTuning: init='text' with a projection, expected projection=None")
