"""LoRA around a frozen embedding: a lookup in A and one small product, for the tokens of a batch, as one op.

    y = W[ids] + Σ scale · A[:, ids]ᵀ Bᵀ        over the active adapters; A is [r, V], B is [D, r]

An embedding that scales its rows (``embed_scale``, Gemma's) scales the term too. Nothing is dropped, as in PEFT.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _check, ops
from . import plain
from .adapter import LoraAdapter, adapter_name
from .backend import serving_backend
from .base_layer import served_dtype, trained_dtype
from .branch import own_path_reason
from .lora import LoraLinear
from .merging import added


class EmbeddingAdapter(LoraAdapter):
    """The trained half, which starts as PEFT's does: A zero and B normal, or with "random" both normal."""

    def reset_parameters(self) -> None:
        """Initialise anew."""
        nn.init.normal_(self.lora_B)
        if self.init == "random":
            nn.init.normal_(self.lora_A)
        else:
            nn.init.zeros_(self.lora_A)


class LoraEmbedding(LoraLinear):
    """A frozen embedding with any number of named LoRA adapters: a ``LoraLinear`` whose input are token ids.

    Args:
        base_layer: ``nn.Embedding`` without ``max_norm``; its weight is frozen.
        name: The name of the first adapter, which is active from the start.
        dtype: The dtype of its parameters; None is the base's, or float32 where that is 16 bits wide, as in PEFT.
        r: The rank, as of ``LoraAdapter``, like what follows.
        alpha: The numerator of the scale.
        dropout: Without effect, as in PEFT; it is kept for the checkpoint.
        rslora: Whether the scale is ``alpha / sqrt(r)`` instead of ``alpha / r``.
        lora_bias: False; an embedding has no bias.
        init: How A and B start: "kaiming" and "gaussian" with A zero and B normal, "random" with both normal.

    Raises:
        TypeError: The base is no embedding that can be adapted.
        ValueError: An argument has a value that it may not have; the error names it and what was expected.
    """

    def __init__(self, base_layer: Any, name: str = "default", dtype: torch.dtype | None = None, **settings: Any):
        nn.Module.__init__(self)
        reason = no_lora_embedding_reason(base_layer)
        if reason is not None:
            raise TypeError(f"LoraEmbedding: base_layer is {reason}, expected nn.Embedding")
        self.base_layer = base_layer.requires_grad_(False)
        self.adapters = nn.ModuleDict()
        self.active, self.merged, self.disabled = (), (), False
        self._before_merge = None
        self.train(base_layer.training)
        self.add_adapter(name, dtype, **settings)
        self.set_adapter([name])

    @property
    def bias(self) -> None:
        return None

    def add_adapter(self, name: str, dtype: torch.dtype | None = None, **settings: Any) -> LoraAdapter:
        """Add an adapter on the base's device; it is inactive and frozen until ``set_adapter``.

        Args:
            name: A name that no adapter of this layer has.
            dtype: The dtype of its parameters; None is the base's, or float32 where that is 16 bits wide.
            settings: What ``LoraAdapter`` takes.

        Returns:
            The new adapter.
        """
        adapter_name("LoraEmbedding", name)
        _check.dtype_or_none("LoraEmbedding", "dtype", dtype)
        if name in self.adapters:
            raise ValueError(f"LoraEmbedding: adapter {name!r} exists already")
        if settings.get("lora_bias"):
            raise ValueError("LoraEmbedding: lora_bias is True, expected False: an embedding has no bias")
        n, k = self._matrix().shape
        dtype, device = dtype or trained_dtype(self.weight.dtype), self.weight.device
        adapter = EmbeddingAdapter(k, n, **settings, dtype=dtype, device=device)
        self.adapters[name] = adapter.requires_grad_(False).train(self.training)
        return adapter

    def forward(self, x: Tensor) -> Tensor:
        """The base's rows with the terms of the active adapters.

        Args:
            x: ``[...]`` token ids.

        Returns:
            ``[..., D]``.
        """
        base: Any = self.base_layer
        if self.disabled or self.merged or not self.active:
            return base(x)
        return embedded(base, x, [(a.lora_A, a.lora_B, a.scale) for a in self._adapters(self.active)])

    def fastpeft_branch(self) -> str:
        """Why it shares no input."""
        return "it is an embedding"

    def fastpeft_backend(self) -> str:
        """The backend for the first active adapter."""
        return serving_embedding(self.base_layer, self._adapters(self.active)[0].lora_A)

    def fastpeft_report(self) -> str:
        """``"fused"``, "fused beside its base" and why, or why this layer computes nothing of its own."""
        if self.disabled or self.merged or not self.active:
            return "disabled" if self.disabled else "merged" if self.merged else "no active adapter"
        reason = unread_reason(self.base_layer)
        return "fused" if reason is None else f"fused beside its base: it {reason}"

    @torch.no_grad()
    def merged_tensors(self, dequantise: torch.dtype | None = None) -> tuple[Tensor, Tensor | None]:
        """The base's weight with the active adapters added, in its dtype, and None.

        Args:
            dequantise: Without effect: no weight here is quantised.

        Raises:
            ValueError: There is no active adapter, or a merged value is not finite.
        """
        if not self.active:
            raise ValueError("no active adapter to merge")
        weight = (self.weight + added(self.base_layer, self._adapters(self.active))[0].T).to(self.weight.dtype)
        if not weight.isfinite().all():
            raise ValueError("the merged weights are not all finite")
        return weight, None

    def _matrix(self) -> Tensor:
        """The frozen weight as ``[D, V]``."""
        return self.base_layer.weight.T


def serving_embedding(base: nn.Module, lora_a: Tensor) -> str:
    """The backend that serves an embedding's call with this A."""
    table: Any = base.weight if unread_reason(base) is None else None
    return serving_backend("lora_embedding", lora_a.new_empty(1, dtype=torch.int64), table, lora_a)


def unread_reason(base: nn.Module) -> str | None:
    """None where the rows of a frozen embedding are read by the op; else why the embedding is called."""
    reason = own_path_reason(base)
    if reason is None and type(base).forward is not nn.Embedding.forward:
        reason = f"is a {type(base).__name__}"
    weight = base._parameters.get("weight")
    if reason is None and (type(weight) not in _check.PLAIN or weight is None or weight.requires_grad):
        return "has no frozen plain weight"
    return reason


def embedded(base: Any, ids: Tensor, terms: Sequence[tuple[Tensor, Tensor, float]]) -> Tensor:
    """The rows of a frozen embedding with the low-rank terms added.

    Args:
        base: The embedding; one that scales its rows by ``embed_scale`` scales the terms too.
        ids: ``[...]``.
        terms: A, B and scale of every adapter, at least one.
    """
    read = unread_reason(base) is None
    y = None if read else base(ids)
    factor = getattr(base, "embed_scale", 1.0)
    if plain.transform() is not None or base.sparse or base.scale_grad_by_freq:
        y = base(ids) if y is None else y
        for lora_a, lora_b, scale in terms:
            settings = {"scale_grad_by_freq": base.scale_grad_by_freq, "sparse": base.sparse}
            low = F.embedding(ids, lora_a.T, base.padding_idx, **settings) @ lora_b.T
            y = y + (low * scale * factor).to(y.dtype)
        return y
    dtype = base.weight.dtype
    for lora_a, lora_b, scale in terms:
        wanted = served_dtype(lora_a.dtype, dtype)
        operands = ids, base.weight if y is None else None, lora_a.to(wanted), lora_b.to(wanted)
        term = ops.lora_embedding(*operands, scale, base.padding_idx)
        y = term if y is None else y + (term * factor).to(y.dtype)
    return cast(Tensor, y)


def no_lora_embedding_reason(module: nn.Module) -> str | None:
    """None for an embedding that can have LoRA, else what it is instead."""
    if not isinstance(module, nn.Embedding):
        return f"a {type(module).__name__}"
    if module.max_norm is not None:
        return "an Embedding with max_norm"
    weight = module.weight
    if type(weight) not in _check.PLAIN or weight.dtype not in _check.FLOATS:
        return f"a {type(module).__name__} with a {type(weight).__name__} weight of {weight.dtype}"
    return None
