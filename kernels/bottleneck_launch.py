"""Tile sizes of bottleneck's kernels, and what their launchers hand them beside tensors."""

import functools

import torch
import triton.language as tl
from torch import Tensor

from .._device import on_device
from .._mask import LANES, threshold
from .launch import WARPGROUPS, Config, Math, cdiv, math, next_power_of_2
from .planes import products

STEPS = ("fused", "hidden", "up", "hidden_backward", "dx", "outer")
FINISH = 32  # rows and columns of a program that adds parts
ROWS = 128  # of a tile at most, where the rows of a program are not one slot's
DECODE = 16  # rows a tile where weights, not rows, are what there is to read
SMALL = (89, 120)  # where one ptxas or another spills a few registers at the tiles that fit elsewhere


def config(
    step: str, hidden: int, dtype: torch.dtype, capability: int, tile: int = ROWS, split: bool = False
) -> Config:
    """The tile sizes of ``step`` for weights of ``dtype``, the largest without spills.

    ``tile`` are the rows at most; with ``split`` weights are multiplied as planes of bfloat16.
    """
    wide = dtype.itemsize > 2  # float32 tiles take twice the shared memory, and three TF32 terms more registers
    block_r, small = max(16, next_power_of_2(hidden)), capability in SMALL
    if split and tile > DECODE and capability in WARPGROUPS:
        return _config_of_planes(step, block_r, tile)
    tile = min(tile, 64)
    if step == "fused":
        block_k = (16 if small else 32) if wide else 32 if block_r > 64 else 64
        return Config(tile, block_k, block_r, 8, 2 if wide else 3)
    block_r, warps = min(block_r, 16 if wide else 64), 8 if tile > DECODE else 4
    if step == "hidden_backward" and small:
        return Config(tile, 16, block_r, warps, 3)
    if step in ("hidden", "hidden_backward"):
        return Config(tile, 32 if wide else 64, block_r, warps, 2 if wide else 3)
    if step in ("up", "dx"):
        block_k = 64 if capability in WARPGROUPS else 16 if small and step == "up" else 32
        return Config(tile, block_k, min(block_r, 32), warps, 2)
    if step == "outer":
        return Config(32, 32 if wide else 64, max(16 if wide else 32, block_r), 4 if wide else 8, 2)
    raise ValueError(f"config: step is {step!r}, expected one of {', '.join(STEPS)}")


def _config_of_planes(step: str, block_r: int, tile: int) -> Config:
    """The same for float32 weights beside bfloat16: large tiles, as every program splits its own into planes."""
    if step == "fused":
        return Config(min(tile, 64), 32, block_r, 4, 3)
    if step == "hidden":
        return Config(min(tile, 64), 32, min(block_r, 128), 4, 3)
    if step == "hidden_backward":
        return Config(tile, 32, min(block_r, 64), tile // 16, 3)
    if step in ("up", "dx"):
        return Config(tile, 128, min(block_r, 32), tile // 16, 2)
    if step == "outer":
        return Config(64, 128, min(block_r, 64), 8, 2)
    raise ValueError(f"config: step is {step!r}, expected one of {', '.join(STEPS)}")


def math_of(x: Tensor, weights, *others: Tensor) -> Math:
    """How x and what else has rows are multiplied with the weights; normalised rows are float32, and no planes."""
    plain = weights.norm_weight is None and all(t.dtype == x.dtype for t in others)
    return (products if plain else _math)(x, weights.down, torch.float32)


def math_to(x: Tensor, weights, out: torch.dtype) -> Math:
    """How hidden values, in the weights' dtype, are multiplied with them where the result is rounded to ``out``."""
    found, acc = products(weights.down, weights.down, out), math(x, weights.down)
    return found if x.dtype == out == torch.bfloat16 and weights.norm_weight is None else acc


def _math(x: Tensor, weight: Tensor, _: torch.dtype) -> Math:
    return math(x, weight)


def norm_of(weights, settings) -> str:
    return "" if weights.norm_weight is None else settings.norm


def factor_of(scale: float, dropout: float) -> float:
    """Of what the mask keeps."""
    return scale * LANES / (LANES - threshold(dropout))


def numbers_of(settings, x: Tensor, weight: Tensor) -> Tensor:
    """``[3]``: the branch's factor, eps, and the threshold of the mask."""
    return _numbers_table(settings.scale, settings.eps, settings.dropout, math(x, weight).torch, x.device)


# What ``numbers_of`` holds, in this order.
FACTOR, EPS, THRESHOLD = map(tl.constexpr, range(3))


@functools.lru_cache(maxsize=4096)
def _numbers_table(scale: float, eps: float, dropout: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    # Kernels read these as data, so that a new scale or dropout compiles nothing, and in the dtype of their sums.
    return on_device([factor_of(scale, dropout), eps, threshold(dropout)], dtype, device)


def tables_of(routing) -> tuple[Tensor | None, ...]:
    return (None, None, None) if routing is None else (routing.order, routing.starts, routing.tiles)


def blocks_of(m, block_m, routing):
    """How many programs share the rows, the tables that say which, and the stride between the latter's rows."""
    if routing is None:
        return cdiv(m, block_m), tables_of(None), 0
    return routing.tiles.shape[1], tables_of(routing), routing.tiles.stride(0)


def seed_stride(seed: Tensor | None) -> int:
    return 0 if seed is None or seed.numel() == 1 else seed.stride(0)


def stride_of(tensor: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if tensor is None else tensor.stride()


def strides_of(weights, routing) -> list[tuple[int, ...]]:
    """Of every tensor from slot to slot, 0 where there are none, and within one; a scale of one element repeats it."""
    found = []
    for t in weights:
        strides = (0, 0) if t is None else t.stride() if routing is not None else (0, *t.stride())
        found.append((*strides[:-1], 0) if t is weights.scale and t is not None and t.shape[-1] == 1 else strides)
    return found


def empty_kept(x: Tensor, weights, settings) -> Tensor:
    """Memory for what ``forward`` keeps for ``backward``: where there is a norm, two numbers a row."""
    shape = (0,) if weights.norm_weight is None else (2, x.shape[0])
    return x.new_empty(shape, dtype=math(x, weights.down).torch)
