"""The LoRA config: what to adapt and how. Checked when it is made, so that no model is touched with a bad one."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ... import _check
from ...nn.adapter import INITS

ALL_LINEAR = "all-linear"
BIASES = ("none", "all", "lora_only")


@dataclass(frozen=True, kw_only=True)
class Lora:
    """LoRA for ``fastpeft.attach``: ``y = x Wᵀ + bias + scale · (drop(x) Aᵀ) Bᵀ``. Names in [brackets] are PEFT's.

    Args:
        r: The rank, at least 1.
        alpha: The numerator of the scale, which is ``alpha / r`` [lora_alpha]. Both defaults are PEFT's.
        dropout: The probability of dropping an element of x in the low-rank branch, in [0, 1) [lora_dropout].
        targets: Which linear layers to adapt [target_modules]. "all-linear" is all but the output head; another string
            is a regular expression for whole paths; a list holds paths or their ends, ``["q_proj", "v_proj"]``. An
            embedding is adapted where it is named.
        experts: Whether the weights of experts are adapted too, which a model keeps as parameters of three dimensions,
            where ``targets`` mean them: all of them with "all-linear", else those whose name, or an older name of
            theirs (gate_proj, w1), is given. A list holds parameters' paths or their ends instead,
            ``["experts.gate_up_proj"]``, also of two dimensions [target_parameters].
        exclude: A regular expression for whole paths, or a list of paths and their ends, that are left out
            [exclude_modules].
        layers: Only in these layers of the stack: their numbers, or a single one, with ``targets`` as a list only; a
            whole path in it is adapted whatever its layer [layers_to_transform].
        layers_pattern: Names of the stack, if the first number in a path is not the one meant.
        rank_pattern: r for the paths that a regular expression matches at their end.
        alpha_pattern: alpha for the paths that a regular expression matches at their end.
        rslora: Whether the scale is ``alpha / sqrt(r)`` instead [use_rslora].
        dora: Whether the rows of W + scale · B A have norms that are trained [use_dora]; such an adapter acts alone.
        bias: Which biases of the model are trained as well: "none", "all", or those of the adapted layers, "lora_only".
        lora_bias: Whether B has a bias of its own.
        modules_to_save: Ends of the paths of modules of which a copy is trained and saved (a classifier head).
        init: How A and B start: "kaiming" (the paper's) and "gaussian" as the frozen model, "random" not
            [init_lora_weights].
        dtype: The dtype of A and B; None is the layer's, or float32 where that is 16 bits wide.
        share_inputs: Whether siblings that receive the same tensor (q, k, v; gate, up) read it once; the result is the
            same.
        fuse_mlp: Whether a gated MLP (gate_proj, up_proj and down_proj of Llama and its kin) that is adapted as a whole
            is computed as one op, which keeps and needs less memory.

    Raises:
        TypeError: An argument has a type that it may not have; the error names it and what was expected.
        ValueError: An argument has a value that it may not have, likewise.
    """

    r: int = 8
    alpha: float = 8
    dropout: float = 0.0
    targets: str | Sequence[str] = ALL_LINEAR
    experts: bool | Sequence[str] = True
    exclude: str | Sequence[str] | None = None
    layers: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False
    dora: bool = False
    bias: str = "none"
    lora_bias: bool = False
    modules_to_save: Sequence[str] = ()
    init: str = "kaiming"
    dtype: torch.dtype | None = None
    share_inputs: bool = True
    fuse_mlp: bool = True

    def __post_init__(self):
        self._set("r", _check.positive("Lora", "r", self.r))
        alpha = _check.finite("Lora", "alpha", self.alpha)
        self._set("alpha", int(alpha) if alpha.is_integer() else alpha)  # as people write it into config files
        self._set("dropout", _check.probability("Lora", "dropout", self.dropout))
        for name, check in (("rank_pattern", _check.positive), ("alpha_pattern", _check.finite)):
            for key, value in _mapping(name, getattr(self, name)).items():
                _check.pattern("Lora", f"{name} key {key!r}", key)
                check("Lora", f"{name}[{key!r}]", value)
        _check.one_of("Lora", "bias", self.bias, BIASES)
        _check.one_of("Lora", "init", self.init, INITS)
        for name in ("rslora", "dora", "lora_bias", "share_inputs", "fuse_mlp"):
            _check.boolean("Lora", name, getattr(self, name))
        if self.dora and self.lora_bias:
            raise ValueError("Lora: dora is True beside lora_bias=True, expected one of them")
        _check.dtype_or_none("Lora", "dtype", self.dtype)
        self._set("modules_to_save", _check.names("Lora", "modules_to_save", self.modules_to_save))
        for name in ("targets", "exclude", "layers_pattern"):
            value = getattr(self, name)
            if isinstance(value, str):
                _check.pattern("Lora", name, value)
            elif value is not None:
                self._set(name, _check.names("Lora", name, value))
        if not isinstance(self.experts, bool):
            self._set("experts", _check.names("Lora", "experts", self.experts))
        self._check_targets()
        if self.layers is not None:
            self._check_layers()

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_targets(self) -> None:
        if not self.targets and (self.targets == "" or not isinstance(self.experts, tuple) or not self.experts):
            raise ValueError(f'Lora: targets is {self.targets!r}, expected "{ALL_LINEAR}", a pattern or names')
        for word in (self.targets,) if isinstance(self.targets, str) else self.targets:
            meant = re.sub(r"[^a-z]", "", word.lower()) == "alllinear"
            if meant and self.targets != ALL_LINEAR:
                raise ValueError(f'Lora: targets is {self.targets!r}, expected "{ALL_LINEAR}", as a string of its own')

    def _check_layers(self) -> None:
        layers = self.layers if hasattr(self.layers, "__iter__") else (self.layers,)
        numbers = _check.integers("Lora", "layers", layers)
        if not numbers or min(numbers) < 0:
            raise ValueError(f"Lora: layers is {self.layers!r}, expected layer numbers of at least 0")
        if isinstance(self.targets, str):
            raise ValueError(
                f"Lora: layers is {self.layers!r} beside targets={self.targets!r}, expected a list of targets"
            )
        self._set("layers", numbers)

    def rank_of(self, path: str) -> int:
        """r of a layer.

        Args:
            path: The layer's, in the model; of experts, the parameter's.
        """
        return _lookup(self.rank_pattern, path, self.r)

    def alpha_of(self, path: str) -> float:
        """alpha of a layer.

        Args:
            path: The layer's, in the model; of experts, the parameter's.
        """
        return _lookup(self.alpha_pattern, path, self.alpha)


def _lookup(patterns: Mapping, path: str, default):
    # PEFT's rule: the first pattern that matches the path from a dot to its end.
    return next((value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", path)), default)


def _mapping(name: str, value: object) -> Mapping:
    if not isinstance(value, Mapping):
        raise TypeError(f"Lora: {name} is {_check.shown(value)}, expected a dict of patterns")
    return value
