"""Training with the forward that serves: ``serving_bits``.

    y = base(x)        y += scale · (drop(x) Aᵀ) Bᵀ        by ops.multi_lora, rounded once

A layer that trains is usually one call of ``ops.lora_linear``, which adds base and term up in another order than a bank
does: in bfloat16 about half of the outputs differ in their last bit, and what a policy's trainer takes for the
probability of a token is not what its server drew by. Here the layer is computed as ``serving.AdapterBank`` computes
it: the frozen layer is called, and ``multi_lora`` adds the term of an adapter that lies in a slot of the same size.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _check, ops
from ..nn.branch import Branch, own_path_reason
from ..nn.lora import LoraLinear
from ..nn.slot_rank import slot_rank
from ..ops.routing import TILES, Routing

_EXPECTED = "expected linear layers with one active adapter, which a bank serves"


@contextlib.contextmanager
def serving_bits(model: nn.Module, max_rank: int = 64) -> Iterator[None]:
    """A context in which a model's LoRA layers compute the bits with which ``AdapterBank`` serves their adapter.

    Each layer's outputs are then, bit for bit, those of a bank on the same base for the same rows ``x``, whichever
    other adapters the bank's batch holds; gradients are those of that forward. Beside the layers, attention and sums
    over many rows are PyTorch's: they have the same bits for batches of the same shape. Recomputation under gradient
    checkpointing, and so backward, belongs inside the context.

    Args:
        model: adapted by ``attach`` with ``Lora``, or PEFT's after ``accelerate``.
        max_rank: that of the bank, whose slots have this size.

    Raises:
        ValueError: a LoRA layer is no linear layer with one active adapter, or its rank is above ``max_rank``; nothing
            has been changed. In the context such a layer raises it when it is called.

    >>> with fastpeft.serving_bits(model):
    ...     loss = model(ids, labels=ids).loss
    ...     loss.backward()
    """
    max_rank = _check.positive("serving_bits", "max_rank", max_rank)
    kind = LoraLinear.fastpeft_kind
    layers: dict[str, Any] = {
        path: module for path, module in model.named_modules() if getattr(module, "fastpeft_kind", None) == kind
    }
    if not layers:
        raise ValueError(f"serving_bits: {type(model).__name__} has no fused LoRA layer, {_EXPECTED}")
    for path, layer in layers.items():
        reason = own_path_reason(layer)
        if reason is not None:
            raise ValueError(f"serving_bits: {path} {reason}, {_EXPECTED}")
        _branch(path, layer, max_rank)
    routings: dict[tuple, Routing] = {}
    try:
        for path, layer in layers.items():
            layer.forward = _forward(path, layer, max_rank, routings)
        yield
    finally:
        for layer in layers.values():
            layer.__dict__.pop("forward", None)


def _branch(path: str, layer: Any, max_rank: int) -> Branch | None:
    """What the layer adds to its base; None: nothing, its adapters are disabled or belong to other layers."""
    branch = layer.fastpeft_branch()
    if isinstance(branch, str):
        if branch in ("disabled", "0 active adapters", "its adapters are disabled", "no adapter is active"):
            return None
        raise ValueError(f"serving_bits: {path}: {branch}, {_EXPECTED}")
    if branch.lora_bias is not None:
        raise ValueError(f"serving_bits: {path} has a trained bias, {_EXPECTED}")
    if branch.lora_a.shape[0] > max_rank:
        given = f"rank {branch.lora_a.shape[0]}"
        raise ValueError(f"serving_bits: {path} has {given}, expected at most max_rank={max_rank}")
    return branch


def _forward(path: str, layer: Any, max_rank: int, routings: dict) -> Callable[[Tensor], Tensor]:
    numbers: dict[tuple, tuple[Tensor, Tensor]] = {}

    def forward(x: Tensor) -> Tensor:
        branch, base = _branch(path, layer, max_rank), layer.base_layer
        y = base(x)
        if branch is None:
            return y
        rank, dtype = branch.lora_a.shape[0], _dtype(base, x)
        # What a bank holds: the adapter in the base's dtype, in a slot that is wider than its rank.
        room = max_rank - rank
        lora_a, lora_b = F.pad(branch.lora_a.to(dtype), (0, 0, 0, room)), F.pad(branch.lora_b.to(dtype), (0, room))
        key = branch.scale, rank, x.device
        if key not in numbers:
            with torch.inference_mode(False):
                served = slot_rank(rank, max_rank, x.device.type == "cpu")
                ranks = torch.tensor([served], dtype=torch.int32, device=x.device)
                numbers[key] = torch.tensor([branch.scale], dtype=_sums(dtype), device=x.device), ranks
        scales, ranks = numbers[key]
        dropouts = [branch.dropout] if branch.dropout else None
        routing = _routing(x, routings)
        return ops.multi_lora(x, lora_a[None], lora_b[None], routing, scales, ranks, y, dropouts=dropouts)

    return forward


def _dtype(base: Any, x: Tensor) -> torch.dtype:
    """Of the adapter in a bank: the weight's, or where that is quantised the activations'."""
    return base.weight.dtype if base.weight.dtype.is_floating_point else x.dtype


def _sums(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _routing(x: Tensor, routings: dict) -> Routing:
    """Every row has slot 0; by the kernels that serve steps of up to 512 tokens, however many rows these are."""
    key = rows, device = x.shape[:-1].numel(), x.device
    if key not in routings:
        with torch.inference_mode(False):
            slots = torch.zeros(rows, dtype=torch.int32, device=device)
            routings[key] = ops.route(slots, 1, TILES[0])
    return routings[key]
