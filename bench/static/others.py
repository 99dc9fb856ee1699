"""The launches of the other ops, as ``layer.py`` has those of a LoRA layer."""

from collections.abc import Callable, Iterator

import torch

from .launches import Launch, Other, launches
from .layer import Layer
from .model import DRAM

Steps = Iterator[tuple[str, float, list[Launch | Other]]]
SLOTS = 32  # of multi_lora, each with as many tokens


def bottleneck(layer: Layer, architecture: int = 90) -> Steps:
    """An adapter of width ``layer.rank`` with biases, x its residual, no norm; forward and backward."""
    from fastpeft.kernels import bottleneck as kernels

    from fastpeft.reference.bottleneck_terms import Settings, Weights

    h, k, n = layer.rank, layer.inputs, layer.inputs
    weights = Weights(_new(layer, h, k), _new(layer, h), _new(layer, n, h), _new(layer, n), None, None, None)
    settings = Settings("gelu", 2.0, "layer", 1e-5, layer.dropout, True)
    x, dy = (_new(layer, layer.rows, size, dtype=layer.dtype) for size in (k, n))
    seed = _new(layer, 1, dtype=torch.int64) if layer.dropout else None
    once = layer.rows * k * layer.dtype.itemsize / DRAM
    kept = kernels.empty_kept(x, weights, settings)
    needs = (True, *(t is not None for t in weights))
    yield "forward", 2 * once, launches(lambda: kernels.forward(x, weights, None, settings, seed, None), architecture)
    call: Callable = lambda: kernels.backward(dy, x, kept, weights, settings, seed, None, needs)  # noqa: E731
    yield "backward", 3 * once, launches(call, architecture)


def multi_lora(layer: Layer, architecture: int = 90) -> Steps:
    """A batch of ``layer.rows`` tokens over 32 slots, as decode has it; backward as well."""
    from fastpeft.kernels import multi_lora as kernels

    from fastpeft.reference import Routing, Slots
    from fastpeft.reference.routing import tile_count

    t, r, tile = layer.rows, layer.rank, 16 if layer.rows <= 256 else 64
    tables = (_new(layer, size, dtype=torch.int32) for size in (t, SLOTS + 1))
    tiles = min(tile_count(t, SLOTS, tile), SLOTS * -(-t // (SLOTS * tile)))
    routing = Routing(*tables, _new(layer, 2, tiles, dtype=torch.int32), SLOTS, tile)
    dropped = (_new(layer, SLOTS, dtype=torch.int32), _new(layer, SLOTS, dtype=torch.int64))
    ranks = _new(layer, SLOTS, dtype=torch.int32)
    slots = Slots(_new(layer, SLOTS, dtype=torch.float32), ranks, *dropped if layer.dropout else (None, None))
    x, y = (_new(layer, t, size, dtype=layer.dtype) for size in (layer.inputs, layer.outputs))
    a, b = _new(layer, SLOTS, r, layer.inputs), _new(layer, SLOTS, layer.outputs, r)
    matrix, wide, tall = (size * layer.dtype.itemsize / DRAM for size in (a.numel(), x.numel(), y.numel()))
    found: list = []
    shrunk = launches(lambda: found.append(kernels.shrink(x, [a], routing, slots)), architecture)
    yield "shrink", matrix + wide, shrunk
    s = found[0]
    yield "expand", matrix + 2 * tall, launches(lambda: kernels.expand_([y], s, [b], routing, slots), architecture)
    call: Callable = lambda: kernels.backward([y], x, s, [a], [b], routing, slots, True, True, True)  # noqa: E731
    yield "backward", 4 * matrix + 2 * tall + 2 * wide, launches(call, architecture)


def row_linear(layer: Layer, architecture: int = 90) -> Steps:
    """The gradient of 5 % of the weight's rows, and of as many columns."""
    from fastpeft.kernels import row_linear as kernels

    count = layer.outputs // 20
    x, dy = (_new(layer, layer.rows, size, dtype=layer.dtype) for size in (layer.inputs, layer.outputs))
    index, chosen = _new(layer, count, dtype=torch.int64), _new(layer, layer.rows, count, dtype=layer.dtype)
    wide, tall = (layer.rows * size * layer.dtype.itemsize / DRAM for size in (layer.inputs, layer.outputs))
    yield "rows", wide, launches(lambda: kernels.backward(dy, x, index, layer.dtype), architecture)
    yield "columns", tall, launches(lambda: kernels.backward(dy, chosen, None, layer.dtype), architecture)


def _new(layer: Layer, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype or layer.adapters, device="meta")


OPS = {"bottleneck": bottleneck, "multi_lora": multi_lora, "row_linear": row_linear}
