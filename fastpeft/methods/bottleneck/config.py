"""The bottleneck config: which adapter, and where. Checked when made, so that no model is touched with a bad one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from torch import nn

from ... import _check
from ...nn.bottleneck import INITS, SCALES
from ...ops.bottleneck_arguments import ACTIVATIONS, NORMS

PLACES = ("attention", "mlp", "cross")
_DEFAULTS = {
    "places": ("mlp",),
    "reduction_factor": 16,
    "activation": "relu",
    "scale": 1.0,
    "parallel": False,
    "original_norm_before": False,
    "original_norm_after": True,
    "residual_before_norm": True,
    "init": "bert",
    "stochastic_depth": 0.0,
}
_FLAGS = ("parallel", "norm_after", "residual_first", "original_norm_before", "original_norm_after", "gating")
_PARALLEL = {"parallel": True, "reduction_factor": 2, "scale": 4.0, "init": "mam"}
# By the names that AdapterHub's library has for them; what is not given is as in _DEFAULTS.
PRESETS: dict[str, dict] = {
    "seq_bn": {"original_norm_before": True},
    "double_seq_bn": {"places": ("attention", "mlp"), "activation": "silu"},
    "par_bn": _PARALLEL,
    "scaled_par_bn": {**_PARALLEL, "scale": "learned"},
    "adapter_plus": {
        "original_norm_before": True,
        "original_norm_after": False,
        "residual_before_norm": False,
        "reduction_factor": 96,
        "activation": "gelu",
        "scale": "channel",
        "init": "houlsby",
        "stochastic_depth": 0.1,
    },
}
PRESETS |= {"pfeiffer": PRESETS["seq_bn"], "houlsby": PRESETS["double_seq_bn"], "parallel": PRESETS["par_bn"]}


@dataclass(frozen=True)
class Bottleneck:
    """Bottleneck adapters for ``fastpeft.attach``: ``y = residual + scale · (act(norm(x) Dᵀ + d) Uᵀ + u)``.

    Names in [brackets] are those of AdapterHub's library ``adapters``. What is None is as the preset has it.

    Args:
        preset: Where adapters go and how they start: "seq_bn" (Pfeiffer: after the MLP), "double_seq_bn" (Houlsby:
            after attention and MLP), "par_bn" (He: beside the MLP, scale 4), "scaled_par_bn" (its scale learned) or
            "adapter_plus" (Steitz and Roth); also by the names "pfeiffer", "houlsby", "parallel".
        places: Any of "attention", "mlp" and "cross", after cross-attention [mh_adapter, output_adapter,
            cross_adapter].
        size: The width of the bottleneck, at least 1; not beside ``reduction_factor``.
        reduction_factor: The model's width over that of the bottleneck, which is at least 1; a dict gives one for each
            layer number, and for the key "default" [reduction_factor].
        activation: "relu", "gelu", "gelu_tanh", "silu", "tanh", "leaky_relu" or "identity" [non_linearity].
        scale: A number, "learned" (one parameter) or "channel" (one parameter a feature) [scaling].
        parallel: Whether the adapter is fed with the input of the sub-block's residual connection instead of the
            sub-block's output [is_parallel].
        norm: The adapter's own norm before its projection: "layer" [ln_before], "rms" or None.
        norm_after: Whether a LayerNorm follows the adapter [ln_after].
        residual_first: Whether the residual is added before that norm [adapter_residual_before_ln].
        original_norm_before: Whether the adapter is fed with the sub-block's output after the model's own residual
            connection, and norm where there is one [original_ln_before]. Of sequential adapters only, as the next two.
        original_norm_after: Whether the model's residual connection and norm are applied after it as well
            [original_ln_after].
        residual_before_norm: Where the adapter's residual is taken: before these (True), after them (False) or between
            them ("post_add") [residual_before_ln].
        gating: Whether the output is multiplied by a learned gate, averaged over the sequence [use_gating].
        dropout: The probability of dropping an element of its output, in [0, 1), in training only.
        stochastic_depth: The probability of dropping the whole adapter for a sample, in [0, 1), in training only.
        init: How it starts: "bert", "mam" (as the frozen model) or "houlsby" [init_weights].
        leave_out: The numbers of layers without adapters [leave_out].
        targets: Where to put them instead of ``places``, on any model: a regular expression for whole paths, a list of
            paths or their ends, or a function of (path, module). The adapter follows the module (``parallel``: stands
            beside it), its residual is the module's output, and the ``original_norm`` settings have no meaning.
        features: The width of the modules in ``targets``, where it cannot be read off.
        dtype: The adapters' dtype; None is the model's, or float32 where that is 16 bits wide.

    Raises:
        TypeError: An argument has a type that it may not have; the error names it and what was expected.
        ValueError: An argument has a value that it may not have, likewise.
    """

    preset: str = "seq_bn"
    places: Sequence[str] | None = None
    size: int | None = None
    reduction_factor: float | Mapping[str, float] | None = None
    activation: str | None = None
    scale: float | str | None = None
    parallel: bool | None = None
    norm: str | None = None
    norm_after: bool = False
    residual_first: bool = False
    original_norm_before: bool | None = None
    original_norm_after: bool | None = None
    residual_before_norm: bool | str | None = None
    gating: bool = False
    dropout: float = 0.0
    stochastic_depth: float | None = None
    init: str | None = None
    leave_out: Sequence[int] = ()
    targets: str | Sequence[str] | Callable[[str, nn.Module], bool] | None = None
    features: int | None = None
    dtype: torch.dtype | None = None

    def __post_init__(self):
        _check.one_of("Bottleneck", "preset", self.preset, PRESETS)
        if self.size is not None and self.reduction_factor is not None:
            raise ValueError(
                f"Bottleneck: size is {self.size!r} beside reduction_factor={self.reduction_factor!r}, expected one"
            )
        for name, value in {**_DEFAULTS, **PRESETS[self.preset]}.items():
            if getattr(self, name) is None and not (name == "reduction_factor" and self.size is not None):
                self._set(name, value)
        self._check_numbers()
        self._check_words()
        self._check_targets()
        self._check_residual()

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_numbers(self):
        for name in ("size", "features"):
            if getattr(self, name) is not None:
                self._set(name, _check.positive("Bottleneck", name, getattr(self, name)))
        factors: Any = self.reduction_factor
        factors = factors if isinstance(factors, Mapping) else {"": factors}
        for key, value in factors.items() if self.reduction_factor is not None else ():
            label = f"reduction_factor[{key!r}]" if key else "reduction_factor"
            if _check.finite("Bottleneck", label, value) <= 0:
                raise ValueError(f"Bottleneck: {label} is {value!r}, expected a number above 0")
        if isinstance(self.scale, str):
            _check.one_of("Bottleneck", "scale", self.scale, SCALES)
        else:
            self._set("scale", _check.finite("Bottleneck", "scale", cast(float, self.scale)))
        for name in ("dropout", "stochastic_depth"):
            self._set(name, _check.probability("Bottleneck", name, getattr(self, name)))
        _check.dtype_or_none("Bottleneck", "dtype", self.dtype)

    def _check_words(self):
        _check.one_of("Bottleneck", "activation", self.activation, ACTIVATIONS)
        _check.one_of("Bottleneck", "init", self.init, INITS)
        _check.one_of("Bottleneck", "norm", self.norm, (None, *NORMS))
        _check.one_of("Bottleneck", "residual_before_norm", self.residual_before_norm, (True, False, "post_add"))
        for name in _FLAGS:
            _check.boolean("Bottleneck", name, getattr(self, name))
        places = _check.names("Bottleneck", "places", (self.places,) if isinstance(self.places, str) else self.places)
        for place in places:
            _check.one_of("Bottleneck", "places", place, PLACES)
        self._set("places", tuple(place for place in PLACES if place in places))
        left = self.leave_out if hasattr(self.leave_out, "__iter__") else (self.leave_out,)
        numbers = _check.integers("Bottleneck", "leave_out", left)
        if numbers and min(numbers) < 0:
            raise ValueError(f"Bottleneck: leave_out is {self.leave_out!r}, expected layer numbers of at least 0")
        self._set("leave_out", numbers)

    def _check_targets(self):
        if self.targets is None:
            if not self.places:
                raise ValueError(f"Bottleneck: places is {self.places!r}, expected some of {', '.join(PLACES)}")
        elif isinstance(self.targets, str):
            _check.pattern("Bottleneck", "targets", self.targets)
        elif not callable(self.targets):
            words = _check.names("Bottleneck", "targets", self.targets)
            if not words:
                raise ValueError("Bottleneck: targets is empty, expected names, a pattern or a function")
            self._set("targets", words)

    def _check_residual(self):
        if self.parallel or self.targets is not None or self.original_norm_after:
            return
        if not self.original_norm_before or self.residual_before_norm is not False:
            raise ValueError(
                "Bottleneck: original_norm_after=False would lose the model's residual connection, expected "
                "original_norm_before=True and residual_before_norm=False beside it"
            )

    def size_of(self, features: int, layer: int | None) -> int:
        """The width of the bottleneck in a layer; the rule is that of ``adapters``.

        Args:
            features: The layer's width.
            layer: Its number, for a ``reduction_factor`` that is a dict; None has the one for "default".

        Raises:
            ValueError: ``reduction_factor`` has no entry for the layer.
        """
        if self.size is not None:
            return self.size
        factor: Any = self.reduction_factor
        if isinstance(factor, Mapping):
            found = factor.get(str(layer), factor.get(layer, factor.get("default")))
            if found is None:
                raise ValueError(
                    f"Bottleneck: reduction_factor has no entry for layer {layer}, expected one or 'default'"
                )
            factor = found
        return max(1, int(features // factor))

    def as_dict(self) -> dict[str, Any]:
        """Every field by its name, with the preset's values where none were given."""
        return {field.name: getattr(self, field.name) for field in fields(self)}
