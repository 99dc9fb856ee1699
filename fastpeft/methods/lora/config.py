"""The LoRA config: what to adapt and how. Checked when it is made, so that no model is touched with a bad one."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ... import _check
from ...nn.adapter import INITS

BIASES = ("none", "all", "lora_only")


@dataclass(frozen=True, kw_only=True)
class Lora:
    """LoRA for ``fastpeft.attach``: ``y = x Wᵀ + bias + scale · (drop(x) Aᵀ) Bᵀ``. Names in [brackets] are PEFT's.

    Args:
        r: rank.
        alpha: numerator of the scale, which is ``alpha / r`` [lora_alpha].
        dropout: probability of dropping an element of x in the low-rank branch, in [0, 1) [lora_dropout].
        targets: which linear layers [target_modules]: "all-linear", all but the output head; another string is a
            regular expression for whole paths; a list holds paths or their ends, ``["q_proj", "v_proj"]``.
        exclude: regular expression or list of paths and their ends that are left out [exclude_modules].
        layers: only in these layers of the stack [layers_to_transform]; layers_pattern: names of the stack, if the
            first number in a path is not the one meant. With targets as a list only.
        rank_pattern, alpha_pattern: r or alpha for the paths that a regular expression matches at their end.
        rslora: scale is ``alpha / sqrt(r)`` [use_rslora].
        bias: which biases of the model are trained as well: "none", "all", or those of the adapted layers, "lora_only".
        lora_bias: give B a bias.
        modules_to_save: ends of paths of modules of which a copy is trained and saved (a classifier head).
        init: "kaiming" (the paper's) and "gaussian" start as the frozen model, "random" does not [init_lora_weights].
        dtype: of A and B; None is the layer's, or float32 where that is 16 bits wide.
        share_inputs: let siblings that receive the same tensor (q, k, v; gate, up) read it once; same result.

    Raises:
        TypeError, ValueError: naming the argument, what it is and what was expected.
    """

    r: int = 8
    alpha: float = 16
    dropout: float = 0.0
    targets: str | Sequence[str] = "all-linear"
    exclude: str | Sequence[str] | None = None
    layers: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False
    bias: str = "none"
    lora_bias: bool = False
    modules_to_save: Sequence[str] = ()
    init: str = "kaiming"
    dtype: torch.dtype | None = None
    share_inputs: bool = True

    def __post_init__(self):
        _check.positive("Lora", "r", self.r)
        _check.finite("Lora", "alpha", self.alpha)
        _check.probability("Lora", "dropout", self.dropout)
        for pattern, value in {**_mapping("rank_pattern", self.rank_pattern)}.items():
            _regex(f"rank_pattern key {pattern!r}", pattern)
            _check.positive("Lora", f"rank_pattern[{pattern!r}]", value)
        for pattern, value in {**_mapping("alpha_pattern", self.alpha_pattern)}.items():
            _regex(f"alpha_pattern key {pattern!r}", pattern)
            _check.finite("Lora", f"alpha_pattern[{pattern!r}]", value)
        for name, expected in (("bias", BIASES), ("init", INITS)):
            if getattr(self, name) not in expected:
                raise ValueError(f"Lora: {name} is {getattr(self, name)!r}, expected one of {', '.join(expected)}")
        for name in ("rslora", "lora_bias", "share_inputs"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"Lora: {name} is {getattr(self, name)!r}, expected True or False")
        if self.dtype is not None and not (isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point):
            raise TypeError(f"Lora: dtype is {self.dtype!r}, expected a floating-point torch.dtype or None")
        self._check_names()

    def _check_names(self):
        for name in ("targets", "exclude", "layers_pattern", "modules_to_save"):
            value = getattr(self, name)
            if isinstance(value, str):
                if name == "modules_to_save":
                    raise TypeError(f"Lora: modules_to_save is the string {value!r}, expected a list of names")
                _regex(name, value)
            elif value is not None:
                object.__setattr__(self, name, tuple(_words(name, value)))
        if not self.targets:
            raise ValueError(f'Lora: targets is {self.targets!r}, expected "all-linear", a pattern or names')
        if self.layers is None:
            return
        layers = (self.layers,) if isinstance(self.layers, int) else tuple(self.layers)
        if not layers or any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in layers):
            raise ValueError(f"Lora: layers is {self.layers!r}, expected layer numbers of at least 0")
        if isinstance(self.targets, str):
            raise ValueError(
                f"Lora: layers is {self.layers!r} beside targets={self.targets!r}, expected a list of targets"
            )
        object.__setattr__(self, "layers", layers)

    def rank_of(self, path: str) -> int:
        """r of the layer at ``path``."""
        return _lookup(self.rank_pattern, path, self.r)

    def alpha_of(self, path: str) -> float:
        """alpha of the layer at ``path``."""
        return _lookup(self.alpha_pattern, path, self.alpha)


def _lookup(patterns: Mapping, path: str, default):
    # PEFT's rule: the first pattern that matches the path from a dot to its end.
    return next((value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", path)), default)


def _mapping(name: str, value: object) -> Mapping:
    if not isinstance(value, Mapping):
        raise TypeError(f"Lora: {name} is {type(value).__name__}, expected a dict of patterns")
    return value


def _words(name: str, value: object) -> Sequence[str]:
    try:
        words = list(value)
    except TypeError:
        words = [None]
    for word in words:
        if not isinstance(word, str) or not word:
            raise TypeError(f"Lora: {name} is {value!r}, expected names")
    return words


def _regex(name: str, pattern: object) -> None:
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"Lora: {name} is {pattern!r}, expected a regular expression ({error})") from None
