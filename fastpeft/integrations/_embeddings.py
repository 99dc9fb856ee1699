"""Which calls of a PEFT LoRA layer around an embedding the fused op serves. Nothing here imports peft."""

from typing import Any

import torch
from torch import Tensor, nn

from .. import _check
from ..nn.lora import LoraLinear
from ..nn.lora_embedding import embedded, no_lora_embedding_reason, serving_embedding, unread_reason


class EmbeddingForward(nn.Module):
    """What PEFT's LoRA layers around embeddings are given."""

    fastpeft_kind = LoraLinear.fastpeft_kind

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The embedding's rows with the terms of the active adapters; whatever else is asked for, PEFT gives.

        Args:
            x: token ids ``[...]``.
            args: as PEFT's layer takes them.
            kwargs: likewise.
        """
        terms = "" if args or kwargs or torch.compiler.is_exporting() else _terms(self)
        if isinstance(terms, str):
            return super().forward(x, *args, **kwargs)
        layer: Any = self
        return embedded(layer.base_layer, x, terms)

    def fastpeft_branch(self) -> str:
        """Why it shares no input."""
        return "it is an embedding"

    def fastpeft_backend(self) -> str:
        """The backend for the first active adapter."""
        terms, layer = _terms(self), self.__dict__["_modules"]
        return terms if isinstance(terms, str) else serving_embedding(layer["base_layer"], terms[0][0])

    def fastpeft_report(self) -> str:
        """``"fused"``, "fused beside its base" and why, or why PEFT's own forward serves this layer as it is now."""
        return report(self)


def report(layer: Any) -> str:
    """What ``EmbeddingForward`` does for this layer.

    Args:
        layer: PEFT's, or one of ours.
    """
    terms = _terms(layer)
    if isinstance(terms, str):
        return terms
    reason = unread_reason(layer.base_layer)
    return "fused" if reason is None else f"fused beside its base: base_layer {reason}"


def _terms(layer: Any) -> list[tuple[Tensor, Tensor, float]] | str:
    if layer._disable_adapters:
        return "its adapters are disabled"
    if layer.merged_adapters:
        return "its adapters are merged into the base layer"
    base, active, found = layer.base_layer, layer._active_adapter, []
    reason = no_lora_embedding_reason(base)
    if reason is not None:
        return f"base_layer is {reason}"
    for name in (active,) if isinstance(active, str) else active:
        if name not in layer.lora_embedding_A:
            continue
        if name in getattr(layer, "lora_variant", {}) or layer.use_dora.get(name):
            return f"adapter {name!r} is a variant"
        if any(getattr(layer, functions, {}).get(name) is not None for functions in ("input_fns", "output_fns")):
            return f"adapter {name!r} is tensor-parallel"
        a, b, scale = layer.lora_embedding_A[name], layer.lora_embedding_B[name], layer.scaling[name]
        if type(a) not in _check.PLAIN or type(b) not in _check.PLAIN or a.dtype != b.dtype:
            return f"adapter {name!r} has weights that are no plain tensors of one dtype"
        if a.device != base.weight.device or not isinstance(scale, (float, int)):
            return f"adapter {name!r} is on {a.device} with scaling {scale!r}, base_layer on {base.weight.device}"
        found.append((a, b, scale))
    return found or "no adapter is active"
