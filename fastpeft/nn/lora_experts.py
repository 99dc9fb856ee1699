"""LoRA on the weights of a frozen experts module. Its forward is one call into ops.

    W_e + Σ scale · B_e A_e        for every expert e, over the active adapters; never formed where the op serves

The adapters' tensors are PEFT's: the expert is the slow index of ``lora_A [E · r, K]`` and the fast one of
``lora_B [N, r · E]``; ``B_e A_e`` is laid out as the weight is, or is its transpose where the module says that it is
transposed. A parameter of two dimensions (a bias ``[E, N]``, a router's weight) has one pair, as in PEFT.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .. import _check
from .adapter import LoraAdapter, adapter_name
from .backend import serving_backend
from .base_layer import served_dtype, trained_dtype
from .experts_call import ExpertsCall, Term, call_of, layout_of, own, run
from .experts_weights import composed, deltas, merged, sizes, swapped, unadaptable_reason
from .lora import LoraLinear
from .plain import transform


class ExpertsAdapter(nn.ModuleDict):
    """One adapter of an experts module: a ``LoraAdapter`` for each adapted parameter, by its name."""

    def reset_parameters(self) -> None:
        """Initialise anew."""
        for pair in self.values():
            cast(LoraAdapter, pair).reset_parameters()


class LoraExperts(LoraLinear):
    """A frozen experts module with any number of named LoRA adapters on its weights, of which some are active.

    >>> layer = LoraExperts(model.model.layers[0].mlp.experts, r=16, alpha=32)

    Where the op cannot serve a call (hooks on the base, a norm after each expert), the base itself is called with
    ``W + scale · B A`` for its weights, as PEFT does it.

    Args:
        base_layer: A module with weights ``[E, ..., ...]``; its parameters are frozen.
        name: The name of the first adapter, which is active from the start.
        dtype: The dtype of its parameters; None is the weight's, or float32 where that is 16 bits wide.
        settings: ``parameters``, ``r``, ``alpha``, ``dropout``, ``rslora`` and ``init``, as ``add_adapter`` takes them.
            A dropout mask's rows count an expert's own tokens (see ``fastpeft.reference.experts``).

    Raises:
        TypeError: A parameter is not there, or is no plain floating-point tensor of two or three dimensions.
        ValueError: An argument has a value that it may not have; the error names it and what was expected.
    """

    def __init__(self, base_layer: Any, name: str = "default", dtype: torch.dtype | None = None, **settings: Any):
        nn.Module.__init__(self)
        self.base_layer = base_layer.requires_grad_(False)
        self.adapters = nn.ModuleDict()
        self.active, self.merged, self.disabled = (), (), False
        self._before_merge: Any = None
        layout = layout_of(base_layer)
        self._served = layout if isinstance(layout, str) else None
        self.train(base_layer.training)
        self.add_adapter(name, dtype, **settings)
        self.set_adapter([name])

    def add_adapter(  # type: ignore[override]  # there is one pair for each parameter
        self,
        name: str,
        dtype: torch.dtype | None = None,
        *,
        parameters: Sequence[str] | None = None,
        r: int | Mapping[str, int] = 8,
        alpha: float | Mapping[str, float] = 8,
        dropout: float = 0.0,
        rslora: bool = False,
        init: str = "kaiming",
    ) -> ExpertsAdapter:
        """Add an adapter on the base's device; it is inactive and frozen until ``set_adapter``.

        Args:
            name: A name that no adapter of this layer has.
            dtype: The dtype of its parameters; None is the weight's, or float32 where that is 16 bits wide.
            parameters: Names of the parameters to adapt; None is the two weights of an experts module of transformers.
            r: The rank for every expert, or a mapping from the parameters' names.
            alpha: The numerator of the scale, or such a mapping.
            dropout: The probability of dropping an element of a projection's input, in [0, 1), in training mode only.
            rslora: Whether the scale is ``alpha / sqrt(r)`` instead of ``alpha / r``.
            init: How A and B start: "kaiming", "gaussian" or "random".

        Returns:
            The new adapter.
        """
        adapter_name("LoraExperts", name)
        _check.dtype_or_none("LoraExperts", "dtype", dtype)
        if name in self.adapters:
            raise ValueError(f"LoraExperts: adapter {name!r} exists already")
        base: Any = self.base_layer
        if parameters is None:
            layout = layout_of(base)
            if isinstance(layout, str):
                raise TypeError(f"LoraExperts: {layout}, expected one, or names for parameters")
            parameters = layout.up, layout.down
        if self._served is not None and dropout:
            raise ValueError(f"LoraExperts: dropout is {dropout}, expected 0, since {self._served}")
        pairs = {}
        for parameter in _check.names("LoraExperts", "parameters", parameters):
            reason = unadaptable_reason(base, parameter)
            if reason is not None:
                raise TypeError(f"LoraExperts: parameter {parameter} of base_layer is {reason}")
            experts, k, n = sizes(base, parameter)
            weight, (rank, numerator) = own(base, parameter), (_of(values, parameter) for values in (r, alpha))
            wanted = dtype or trained_dtype(weight.dtype)
            drop = dropout if weight.dim() == 3 else 0.0
            settings: Any = (rank, numerator, drop, rslora, False, init, wanted, weight.device, experts)
            pairs[parameter] = LoraAdapter(k, n, *settings)
        adapter = ExpertsAdapter(pairs)
        self.adapters[name] = adapter.requires_grad_(False).train(self.training)
        return adapter

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base's output with the adapters' terms.

        Args:
            x: What the base is called with: tokens ``[T, H]``, ...
            args: ... each token's experts ``[T, k]`` and their weights ``[T, k]``.
            kwargs: The same by name.

        Returns:
            What the base returns, ``[T, H]``.
        """
        if self.disabled or self.merged or not self.active:
            return cast(Any, self.base_layer)(x, *args, **kwargs)
        if kwargs and not args:  # as the modules name them
            args, kwargs = tuple(kwargs.pop(n) for n in ("top_k_index", "top_k_weights") if n in kwargs), kwargs
        found = f"the experts are called with {', '.join(kwargs)}" if kwargs else self._call(x, *args)
        if isinstance(found, ExpertsCall):
            return run(found, x, *args)
        if self.training and any(pair.dropout for name in self.active for pair in self._pairs(name).values()):
            raise RuntimeError(f"LoraExperts: dropout beside experts that are not fused ({found}), expected 0")
        weights = {name: composed(self.base_layer, name, terms) for name, terms in self._terms().items()}
        return functional_call(self.base_layer, weights, (x, *args), kwargs)

    def _call(self, x: Tensor | None = None, *args: Tensor) -> ExpertsCall | str:
        """The call of the op that computes this layer, or why there is none."""
        reason = self._served or (None if torch.compiler.is_compiling() else transform())
        return reason or call_of(self.base_layer, self._terms(), x, *args)

    def fastpeft_branch(self) -> str:
        """Why it shares no input."""
        return "it is an experts module"

    def fastpeft_backend(self) -> str:
        """The backend that serves ``ops.experts`` on the layer's tensors."""
        found = self._call()
        if isinstance(found, str):
            return found
        x = found.up.weight.new_empty(1, found.up.weight.shape[2])
        return serving_backend("experts", x, up=found.up, down=found.down)

    def fastpeft_report(self) -> str:
        """``"fused"``, or why this layer does not run as one fused op."""
        if self.disabled or self.merged or not self.active:
            return "disabled" if self.disabled else "merged" if self.merged else "no active adapter"
        found = self._call()
        return f"{found}, so W + scale · B A is made at every call" if isinstance(found, str) else "fused"

    def adapted(self, names: Sequence[str]) -> list[str]:
        """The parameters that these adapters adapt, in the base's order.

        Args:
            names: Of adapters.
        """
        found = {parameter for name in names if name in self.adapters for parameter in self._pairs(name)}
        return [parameter for parameter in self.base_layer._parameters if parameter in found]

    def delta(self, names: str | Sequence[str]) -> dict[str, Tensor]:  # type: ignore[override]
        """What these adapters add to each parameter, in its layout, in float32 or wider.

        Args:
            names: At least one name of an adapter.
        """
        names = [names] if isinstance(names, str) else names
        added = {name: list(deltas(self.base_layer, name, self._adapting(name, names))) for name in self.adapted(names)}
        flat = {name for name in added if own(self.base_layer, name).dim() == 2}
        return {name: found[0] if name in flat else torch.stack(found) for name, found in added.items()}

    @torch.no_grad()
    def merged_tensors(self, dequantise: torch.dtype | None = None) -> dict[str, Tensor]:  # type: ignore[override]
        """The adapted parameters with the active adapters added, in their layout and dtype.

        Args:
            dequantise: Without effect: no weight here is quantised.

        Raises:
            ValueError: There is no active adapter, or a merged value is not finite.
        """
        if not self.active:
            raise ValueError("no active adapter to merge")
        adapted = self.adapted(self.active)
        return {name: merged(self.base_layer, name, self._adapting(name, self.active)) for name in adapted}

    @torch.no_grad()
    def merge(self, tensors: Any = None) -> None:
        """Add the active adapters to the base. The base's own tensors are kept, so ``unmerge`` restores every bit.

        Args:
            tensors: What ``merged_tensors`` gave; None has it computed here.

        Raises:
            ValueError: The layer is merged already, or cannot be merged (see ``merged_tensors``).
        """
        if self.merged:
            raise ValueError("LoraExperts: merge of a merged layer; unmerge it first")
        self._before_merge = self._exchange(self.merged_tensors() if tensors is None else tensors)
        self.merged = self.active

    @torch.no_grad()
    def unmerge(self) -> None:
        """Give the base its own tensors back, bit for bit."""
        if self._before_merge is None:
            raise ValueError("LoraExperts: unmerge of a layer that is not merged")
        self._exchange(self._before_merge)
        self.merged, self._before_merge = (), None

    def extra_repr(self) -> str:
        state = "disabled" if self.disabled else "merged" if self.merged else "active"
        return f"parameters={self.adapted(list(self.adapters))}, {state}={list(self.active)}"

    def _exchange(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        before = {}
        for parameter, value in tensors.items():
            tensor = own(self.base_layer, parameter)
            before[parameter], tensor.data = tensor.data, value
        return before

    def _pairs(self, name: str) -> dict[str, LoraAdapter]:
        return cast(Any, self.adapters[name])._modules

    def _adapting(self, parameter: str, names: Sequence[str]) -> list[LoraAdapter]:
        """These adapters' pairs for a parameter."""
        return [self._pairs(name)[parameter] for name in names if parameter in self._pairs(name)]

    def _terms(self) -> dict[str, list[Term]]:
        """The active adapters of each parameter, in a dtype that the op takes beside it."""
        found: dict[str, list[Term]] = {}
        for parameter in self.adapted(self.active):
            weight, pairs = own(self.base_layer, parameter), self._adapting(parameter, self.active)
            turned = not swapped(self.base_layer, parameter)
            dtypes = {pair.lora_A.dtype for pair in pairs}
            dtype = served_dtype(dtypes.pop() if len(dtypes) == 1 else None, weight.dtype)
            for pair in pairs:
                a, b, dropout = pair.lora_A.to(dtype), pair.lora_B.to(dtype), pair.dropout if self.training else 0.0
                found.setdefault(parameter, []).append(Term(a, b, pair.scale, not turned, dropout))
        return found


def _of(values: Any, parameter: str) -> Any:
    return values[parameter] if isinstance(values, Mapping) else values
