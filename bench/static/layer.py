"""The steps of a LoRA linear layer, launched on meta tensors: what lies between the two base GEMMs."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .launches import Launch, Other, launches
from .model import DRAM, seconds

BF16, FP32 = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Layer:
    """A layer's sizes: x ``[rows, inputs]``, W ``[outputs, inputs]``, as many branches of one rank."""

    rank: int = 16
    adapters: torch.dtype = BF16
    dropout: float = 0.0
    rows: int = 8192
    inputs: int = 4096
    outputs: int = 4096
    branches: int = 1
    dtype: torch.dtype = BF16

    def __str__(self) -> str:
        words = [f"r={self.rank}", f"{self.adapters}".removeprefix("torch."), f"p={self.dropout}", f"M={self.rows}"]
        shared = [f"{self.branches} branches"] if self.branches > 1 else []
        return " ".join([*words, f"{self.inputs}x{self.outputs}", *shared])


def steps(layer: Layer, architecture: int = 90) -> Iterator[tuple[str, float, list[Launch | Other]]]:
    """(step, the floor's seconds: one pass over x, y, dY or dX, launches) of forward and backward."""
    from fastpeft.kernels import lora_linear as kernels

    def new(*shape, dtype=layer.adapters):
        return torch.empty(shape, dtype=dtype, device="meta")

    count, rank = layer.branches, layer.rank
    ranks, dropouts = [rank] * count, [layer.dropout] * count
    x, dy = (new(layer.rows, size, dtype=layer.dtype) for size in (layer.inputs, layer.outputs))
    lora_as, lora_bs = [new(rank, layer.inputs)] * count, [new(layer.outputs, rank)] * count
    seeds = new(count, dtype=torch.int64) if layer.dropout else new(0, dtype=layer.dtype)
    s = new(layer.rows, rank * count)
    s_0, ds_0 = s.split(ranks, 1)[0], torch.empty_like(s).split(ranks, 1)[0]
    wide, tall = (layer.rows * size * layer.dtype.itemsize / DRAM for size in (layer.inputs, layer.outputs))
    calls = {
        "down": (wide, lambda: kernels.down(x, lora_as, [2.0] * count, dropouts, seeds)),
        "up": (tall, lambda: kernels.up(s_0, lora_bs[0], None, layer.dtype)),
        "up_backward": (tall, lambda: kernels.up_backward(dy, s_0, lora_bs[0], 2.0, ds_0, True)),
        "dX": (wide, lambda: kernels.down_backward(s, x, lora_as, dropouts, seeds, True, False)),
        "dA": (wide, lambda: kernels.down_backward(s, x, lora_as, dropouts, seeds, False, True)),
    }
    for step, (floor, call) in calls.items():
        yield step, floor, launches(call, architecture)


def added(layer: Layer, found: list[tuple[str, float, list[Launch | Other]]]) -> float:
    """Predicted seconds that LoRA adds to the frozen layers of all branches, forward and backward.

    ``up`` and ``up_backward`` are one branch's. The base GEMMs read the buffers that they accumulate onto, which costs
    half of that; with dropout a seed is drawn.
    """
    times = {"up": layer.branches, "up_backward": layer.branches}
    read = layer.branches * layer.rows * (layer.inputs + layer.outputs) * layer.dtype.itemsize / DRAM / 2
    seed = seconds(Other("random", 8)) if layer.dropout else 0.0
    return sum(times.get(step, 1) * seconds(one) for step, _, launched in found for one in launched) + read + seed
