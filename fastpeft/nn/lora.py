"""LoRA around a frozen linear layer: parameters, initialisation, merging. Its forward is one call into ops.

    y = x Wᵀ + bias + Σ scale · (drop(x) Aᵀ) Bᵀ        over the active adapters, scale = alpha / r or alpha / sqrt(r)

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021); Kalajdzievski, "A Rank Stabilization
Scaling Factor for Fine-Tuning with LoRA" (2023) for 1 / sqrt(r).
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import _check, ops
from . import dora, merging, plain, quantised
from .adapter import LoraAdapter, adapter_name
from .backend import serving_backend
from .base_layer import features, frozen_weight, is_conv1d, not_adaptable_reason, served_dtype, trained_dtype
from .branch import Branch
from .front import computed, front
from .guarding import keep, kept, state_without_kept
from .low_rank import low_rank
from .sharing import SharedInput


class LoraLinear(nn.Module):
    """A frozen linear layer with any number of named LoRA adapters, of which some are active.

    >>> layer = LoraLinear(nn.Linear(512, 512), r=16, alpha=32, dropout=0.1)
    >>> layer.add_adapter("other", r=4)
    >>> layer.set_adapter(["default", "other"])

    The frozen layer stays what it was, under ``base_layer``; adapters are ``adapters.<name>.lora_A`` and ``lora_B``.
    Without an active adapter, disabled or merged, the layer is its base. Where the base has hooks, parametrisations or
    another forward on the instance, it is called as it is and only the low-rank term is computed here.

    Args:
        base_layer: ``nn.Linear``, transformers' ``Conv1D`` (weight ``[K, N]``), bitsandbytes' ``Linear4bit`` and
            ``Linear8bitLt``, or a subclass of ``nn.Linear``, which is called; its parameters are frozen.
        name: The name of the first adapter, which is active from the start.
        dtype: The dtype of its parameters; None is the base's, or float32 where that is 16 bits wide, as in PEFT.
        r: The rank, as of ``LoraAdapter``, like what follows.
        alpha: The numerator of the scale.
        dropout: The probability of dropping an element of x, in [0, 1), in training mode only.
        rslora: Whether the scale is ``alpha / sqrt(r)`` instead of ``alpha / r``.
        lora_bias: Whether B has a bias ``[N]``.
        init: How A and B start: "kaiming", "gaussian" or "random".
        dora: Whether the rows of W + scale · B A have norms that are trained (DoRA); such an adapter is active alone.

    Raises:
        TypeError: The base is no linear layer with a floating-point weight.
        ValueError: An argument has a value that it may not have; the error names it and what was expected.
    """

    fastpeft_kind = "LoRA layers"
    fastpeft_original = "base_layer"
    fastpeft_shared: SharedInput | None = None  # set by share_inputs
    dora = False  # whether the active adapter is

    def __init__(
        self,
        base_layer: nn.Module,
        name: str = "default",
        dtype: torch.dtype | None = None,
        *,
        r: int = 8,
        alpha: float = 8,
        dropout: float = 0.0,
        rslora: bool = False,
        lora_bias: bool = False,
        init: str = "kaiming",
        dora: bool = False,
    ):
        super().__init__()
        reason = not_adaptable_reason(base_layer)
        if reason is not None:
            raise TypeError(f"LoraLinear: base_layer is {reason}, expected nn.Linear or Conv1D")
        self.base_layer = cast(nn.Linear, base_layer.requires_grad_(False))  # or Conv1D, with the same attributes
        self.adapters = nn.ModuleDict()
        self.active: tuple[str, ...] = ()
        self.disabled = False
        self.merged: tuple[str, ...] = ()
        self._before_merge: merging.Merged | None = None
        self.train(base_layer.training)
        settings: dict[str, Any] = {"r": r, "alpha": alpha, "dropout": dropout, "rslora": rslora}
        self.add_adapter(name, dtype, **settings, lora_bias=lora_bias, init=init, dora=dora)
        self.set_adapter([name])

    @property
    def weight(self) -> Tensor:
        """The frozen weight, as the base stores it."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    @property
    def in_features(self) -> int:
        return features(self.base_layer)[1]

    @property
    def out_features(self) -> int:
        return features(self.base_layer)[0]

    def add_adapter(self, name: str, dtype: torch.dtype | None = None, **settings: Any) -> LoraAdapter:
        """Add an adapter on the base's device; it is inactive and frozen until ``set_adapter``.

        Args:
            name: A name that no adapter of this layer has.
            dtype: The dtype of its parameters; None is the base's, or float32 where that is 16 bits wide.
            settings: What ``LoraAdapter`` takes: r, alpha, dropout, rslora, lora_bias, init, dora.

        Returns:
            The new adapter.
        """
        adapter_name("LoraLinear", name)
        _check.dtype_or_none("LoraLinear", "dtype", dtype)
        if name in self.adapters:
            raise ValueError(f"LoraLinear: adapter {name!r} exists already")
        n, k = features(self.base_layer)
        dtype, device = dtype or trained_dtype(self.weight.dtype), self.weight.device
        adapter = LoraAdapter(k, n, **settings, dtype=dtype, device=device)
        if adapter.lora_magnitude is not None:
            dora.initialise(self.base_layer, adapter)
        self.adapters[name] = adapter.requires_grad_(False).train(self.training)
        return adapter

    def set_adapter(self, names: str | Sequence[str], trainable: bool = True) -> None:
        """Make these adapters active, and trainable unless told otherwise; the others are frozen.

        Args:
            names: The names, or a single one. Without any, the layer is its base.
            trainable: Whether the active adapters ask for gradients.
        """
        names = _check.names("LoraLinear", "names", [names] if isinstance(names, str) else names)
        for missing in (name for name in names if name not in self.adapters):
            raise ValueError(f"LoraLinear: no adapter {missing!r}, expected one of {', '.join(self.adapters)}")
        if self.merged:
            raise ValueError("LoraLinear: set_adapter on a merged layer; unmerge it first")
        names = tuple(dict.fromkeys(names))
        trained = [name for name in names if getattr(self.adapters[name], "lora_magnitude", None) is not None]
        if trained and len(names) > 1:
            raise ValueError(f"LoraLinear: {trained[0]!r} is DoRA, expected no other active adapter than it")
        self.active, self.dora = names, bool(trained)
        for name, adapter in self.adapters.items():
            adapter.requires_grad_(trainable and name in self.active)

    def forward(self, x: Tensor) -> Tensor:
        """The base's output with the terms of the active adapters.

        Args:
            x: ``[..., K]``.

        Returns:
            ``[..., N]``.
        """
        if self.dora and not (self.disabled or self.merged):
            return dora.call(self, x)
        if not torch.compiler.is_compiling():
            if (y := computed(self, x)) is not None:
                return y
            branch = kept(self, x)
            if branch is None:
                if plain.is_plain(x):
                    acting = self._adapters(() if self.disabled or self.merged else self.active)
                    return plain.lora(self.base_layer(x), x, acting, self.training)
                branch = keep(self, x, self.fastpeft_branch(), front)
            if not (isinstance(branch, Branch) and quantised.is_called(branch.weight, x)):
                y = None if self.fastpeft_shared is None else self.fastpeft_shared.forward(self, x, branch)
                if y is None and isinstance(branch, Branch) and branch.lora_bias is None:
                    y = ops.lora_linear(x, *branch[:6])
                if y is not None:
                    return quantised.as_given(y, cast(Branch, branch).weight, x)
        if self.disabled or self.merged or not self.active:
            return self.base_layer(x)
        weight = frozen_weight(self.base_layer)
        if isinstance(weight, str) or quantised.is_called(weight, x):
            y = self.base_layer(x)
            return y + low_rank(self, x, [None] * len(self.active), None).to(y.dtype)
        y = low_rank(self, x, [weight] + [None] * (len(self.active) - 1), self.bias)
        return quantised.as_given(y, weight, x)

    def __getstate__(self) -> dict:
        return state_without_kept(self)

    def fastpeft_branch(self) -> Branch | str:
        """What ``SharedInput`` computes for this layer, or the reason why it does not."""
        found = self.fastpeft_projection()
        return found if isinstance(found, str) else found[0] if found[1] is None else "its adapter is DoRA"

    def fastpeft_projection(self) -> tuple[Branch, Tensor | None] | str:
        """What ``LoraMlp`` computes for this layer, and the magnitude of DoRA; or the reason why it does not."""
        if self.disabled or self.merged or len(self.active) != 1:
            return "disabled" if self.disabled else "merged" if self.merged else f"{len(self.active)} active adapters"
        weight = frozen_weight(self.base_layer)
        if isinstance(weight, str):
            return f"its base layer {weight}"
        modules: dict[str, Any] = self._modules
        base, adapter = modules["base_layer"], modules["adapters"]._modules[self.active[0]]
        if is_conv1d(base):
            return "its base layer is a Conv1D"  # whose transposed weight is another tensor object at every call
        if "parametrizations" in adapter._modules:
            return "its adapter is parametrised"
        frozen, trained = base._parameters, adapter._parameters
        if frozen.get("weight") is None or trained.get("lora_A") is None:
            return "its weights are no parameters"
        lora_a, bias, lora_bias = trained["lora_A"], frozen["bias"], trained["lora_bias"]
        if weight.dtype is not None and served_dtype(lora_a.dtype, weight.dtype) != lora_a.dtype:
            return f"its {lora_a.dtype} adapter is cast at every call"
        if quantised.own_bias(weight, bias, lora_a):
            return "its bias is cast at every call"
        dropout = adapter.dropout if self.training else 0.0
        branch = Branch(weight, lora_a, trained["lora_B"], bias, adapter.scale, dropout, lora_bias)
        return branch, trained["lora_magnitude"]

    fastpeft_guard = quantised.guard_layer

    def fastpeft_backend(self) -> str:
        """The backend for an x of one row and the first active adapter."""
        weight, lora_a = frozen_weight(self.base_layer), self._adapters(self.active)[0].lora_A
        given, dtype = (None, None) if isinstance(weight, str) else (weight, weight.dtype)
        x = lora_a.new_empty(1, lora_a.shape[1], dtype=dtype)
        return serving_backend("dora_linear" if self.dora else "lora_linear", x, given, lora_a)

    def fastpeft_report(self) -> str:
        """``"fused"``, "fused beside its base" and why, or why this layer computes nothing of its own."""
        if self.disabled or self.merged or not self.active:
            written = " into a weight that was written out" if self.merged and self.merged_dtype() else ""
            return "disabled" if self.disabled else f"merged{written}" if self.merged else "no active adapter"
        weight = frozen_weight(self.base_layer)
        if isinstance(weight, str):  # DoRA needs the merged rows' norms, and so the weight
            return f"its adapter is DoRA, and its base {weight}" if self.dora else f"fused beside its base: it {weight}"
        return "fused"

    def delta(self, names: str | Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """What these adapters add to the weight and the bias, in float32 or wider.

        Args:
            names: At least one name of an adapter.

        Returns:
            ``Σ scale · B A`` as ``[N, K]`` and ``Σ scale · lora_bias`` as ``[N]``, or None where none has one.
        """
        if self.merged and self.dora:
            raise ValueError("LoraLinear: delta of a merged layer with DoRA; unmerge it first")
        return merging.added(self.base_layer, self._adapters([names] if isinstance(names, str) else names))

    @torch.no_grad()
    def merged_tensors(self, dequantise: torch.dtype | None = None) -> merging.Merged:
        """The base's weight and bias with the active adapters added, in the base's layout and dtype.

        Args:
            dequantise: The dtype of a plain layer with them, in place of a quantised base; None quantises again.

        Raises:
            ValueError: There is no active adapter, a bias has nowhere to go, or a merged value is not finite.
        """
        if not self.active:
            raise ValueError("no active adapter to merge")
        return merging.merged(self.base_layer, self._adapters(self.active), dequantise)

    @torch.no_grad()
    def merge(self, tensors: merging.Merged | None = None) -> None:
        """Add the active adapters to the base. The base's own tensors are kept, so ``unmerge`` restores every bit.

        Args:
            tensors: What ``merged_tensors`` gave; None has it computed here.

        Raises:
            ValueError: The layer is merged already, or cannot be merged (see ``merged_tensors``).
        """
        if self.merged:
            raise ValueError("LoraLinear: merge of a merged layer; unmerge it first")
        tensors = self.merged_tensors() if tensors is None else tensors
        self._before_merge = merging.exchange(self, *tensors)
        self.merged = self.active

    def merged_dtype(self) -> torch.dtype | None:
        """Of a merged layer whose quantised base was written out for that: the dtype."""
        before: Any = self._before_merge
        written = isinstance(before, tuple) and isinstance(before[0], nn.Module)
        return self.base_layer.weight.dtype if written else None

    @torch.no_grad()
    def unmerge(self) -> None:
        """Give the base its own tensors back, bit for bit."""
        if self._before_merge is None:
            raise ValueError("LoraLinear: unmerge of a layer that is not merged")
        merging.exchange(self, *self._before_merge)
        self.merged, self._before_merge = (), None

    def extra_repr(self) -> str:
        state = "disabled" if self.disabled else "merged" if self.merged else "active"
        return f"in_features={self.in_features}, out_features={self.out_features}, {state}={list(self.active)}"

    def _adapters(self, names: Sequence[str]) -> list[LoraAdapter]:
        return [cast(LoraAdapter, self.adapters[name]) for name in names]
