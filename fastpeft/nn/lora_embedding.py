"""LoRA around a frozen embedding, in plain PyTorch: a lookup in A and one small product, for the tokens of a batch.

    y = W[ids] + Σ scale · A[:, ids]ᵀ Bᵀ        over the active adapters; A is [r, V], B is [D, r]

An embedding that scales its rows (``embed_scale``, Gemma's) scales the term too. Nothing is dropped, as in PEFT.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _check
from .adapter import LoraAdapter, adapter_name
from .base_layer import trained_dtype
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
        y = base(x)
        if self.disabled or self.merged:
            return y
        scale = getattr(base, "embed_scale", 1.0)
        for adapter in self._adapters(self.active):
            down = F.embedding(
                x, adapter.lora_A.T, base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq, sparse=base.sparse
            )
            y = y + (down @ adapter.lora_B.T * adapter.scale * scale).to(y.dtype)
        return y

    def fastpeft_branch(self) -> str:
        """Why it shares no input."""
        return "it is an embedding"

    def fastpeft_report(self) -> str:
        """Why this layer is not one fused op."""
        if self.disabled or self.merged or not self.active:
            return "disabled" if self.disabled else "merged" if self.merged else "no active adapter"
        return "an embedding, whose low-rank term is a lookup and a small product in PyTorch"

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
