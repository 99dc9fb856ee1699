"""How a request's tokens are chosen: every setting, checked as the number that it is used as."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

import torch

from ... import _check

_LARGEST = float(torch.finfo(torch.float32).max)
_LEAST_PENALTY = 1e-3  # what logits are divided by must not make infinities of them
_BIAS, _PENALTY, _TOP_LOGPROBS = 100.0, 2.0, 20  # OpenAI's bounds; vLLM's of logprobs


@dataclass(frozen=True)
class SamplingParams:
    """Settings of one request, in this order: bias, penalties, temperature, top_k, top_p, min_p, draw.

    Args:
        temperature: divides the logits; 0 is greedy, as is what float32 cannot tell from it.
        top_p: draw from the most probable tokens that have so much probability together; 1 is all, 0 the first.
        top_k: draw from so many of the most probable tokens, and those as probable as the last of them; 0 is all.
        min_p: draw from tokens at least so probable, relative to the most probable.
        seed: the same seed draws the same; None draws a new one.
        repetition_penalty: logits of tokens that are in the prompt or were generated are divided by it where they are
            positive, and multiplied where they are negative; 1 is none.
        presence_penalty: is taken from the logits of tokens that were generated.
        frequency_penalty: is taken from the logits of tokens as often as they were generated.
        logit_bias: is added to the logits, by token id.
        min_tokens: how many tokens come before one that ends the request can be chosen.
        ignore_eos: do not end at the model's end-of-sequence tokens.
        logprobs: with each token its log-probability, as the model gives it before any setting, and those of so many of
            the most probable; None for neither.
        prompt_logprobs: likewise for the tokens of the prompt.

    Raises:
        ValueError: a number is out of its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        for name, least, most in (
            ("temperature", 0.0, _LARGEST),
            ("top_p", 0.0, 1.0),
            ("min_p", 0.0, 1.0),
            ("repetition_penalty", _LEAST_PENALTY, 1 / _LEAST_PENALTY),
            ("presence_penalty", -_PENALTY, _PENALTY),
            ("frequency_penalty", -_PENALTY, _PENALTY),
        ):
            object.__setattr__(self, name, _number(name, getattr(self, name), least, most))
        for name in ("top_k", "min_tokens"):
            object.__setattr__(self, name, _integer(name, getattr(self, name), None))
        for name in ("logprobs", "prompt_logprobs"):
            if (count := getattr(self, name)) is not None:
                object.__setattr__(self, name, _integer(name, count, _TOP_LOGPROBS))
        bias = {
            _integer("logit_bias", k, None): _number("logit_bias", v, -_BIAS, _BIAS) for k, v in self.logit_bias.items()
        }
        object.__setattr__(self, "logit_bias", bias)

    @property
    def adjusts(self) -> bool:
        """Whether logits are changed before anything is drawn from them."""
        neutral = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) == (1.0, 0.0, 0.0)
        return bool(self.logit_bias) or self.min_tokens > 0 or not neutral


def one_of(
    sampling: SamplingParams | None, temperature: float, top_p: float, seed: int | None, vocabulary: int
) -> SamplingParams:
    """``sampling``, or those three; never both.

    Raises:
        ValueError: both are given, a number is out of its range, or a biased token is none of the vocabulary.
    """
    if sampling is None:
        return SamplingParams(temperature=temperature, top_p=top_p, seed=seed)
    if (temperature, top_p, seed) != (0.0, 1.0, None):
        raise ValueError("submit: sampling is given, expected no temperature, top_p or seed beside it")
    beyond = next((token for token in sampling.logit_bias if token >= vocabulary), None)
    if beyond is not None:
        raise ValueError(f"submit: logit_bias has token {beyond}, expected token ids from 0 to {vocabulary - 1}")
    return sampling


def _number(name: str, value: Any, least: float, most: float) -> float:
    """As float32 has it, in which it is used: what is below its normal numbers is 0."""
    real = isinstance(value, Real) and not isinstance(value, bool)
    if not real or not least <= value <= most:
        raise ValueError(f"submit: {name} is {_check.shown(value)}, expected a number from {least:g} to {most:g}")
    return float(value) if abs(value) >= torch.finfo(torch.float32).tiny else 0.0


def _integer(name: str, value: Any, most: int | None) -> int:
    integer = isinstance(value, Integral) and not isinstance(value, bool)
    if not integer or value < 0 or (most is not None and value > most):
        bound = "of at least 0" if most is None else f"from 0 to {most}"
        raise ValueError(f"submit: {name} is {_check.shown(value)}, expected an integer {bound}")
    return int(value)
