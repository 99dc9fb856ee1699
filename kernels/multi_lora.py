"""LoRA for a batch whose tokens belong to different adapters: y[t] += (scale · drop(x[t]) A[slot]ᵀ) B[slot]ᵀ.

    shrink    S  = scale · drop(x) Aᵀ       one read of x for all slices; backward: dS = scale · dY B
    expand    y += S Bᵀ                     float32 sum, one rounding; backward: dX = mask ∘ (dS A) / (1 - p)
    outer     G  = Sᵀ drop(x)               dA from (dS, x), dB from (S, dY), each slot's tokens in their order

Alphabet: x [T, K] or dY [T, N] has tokens and columns k; S has columns r, those of slice p from firsts[p] on, and rows
m in the order of ``Routing``. A program takes one tile of one slot's tokens; tokens without an adapter are in no tile
and cost nothing. Ranks are the slots' own: of what lies beyond a slot's true rank nothing is used, and no more is read
than the load of its last column takes along, seven numbers at most. A token's sums depend on its own data and on K, R
and the tile's size, never on the other tokens. Sums cut along K lie in planes, added in order.
"""

from collections.abc import Sequence

from torch import Tensor

from .launch import math
from .multi_lora_backward import run as backward
from .multi_lora_products import DECODE, add_expanded, config, planes, ranks_of, write_shrunk

__all__ = ["add_", "backward", "config", "describe", "expand_", "forward", "planes", "shrink"]


def forward(
    ys: Sequence[Tensor], x: Tensor, lora_as: Sequence[Tensor], lora_bs: Sequence[Tensor], routing, slots
) -> Tensor:
    """``y_p += S_p B_pᵀ`` for each token that has an adapter, in place; returns S as ``shrink`` does."""
    s = shrink(x, lora_as, routing, slots)
    expand_(ys, s, lora_bs, routing, slots)
    return s


def shrink(x: Tensor, lora_as: Sequence[Tensor], routing, slots) -> Tensor:
    """``S_p = scale_p · drop_p(x) A_pᵀ`` of each token's slot, side by side, as sums to add: ``[planes, T, R]``.

    ``routing`` and ``slots`` are ``fastpeft.reference``'s Routing and Slots. What no token or rank asks for is not
    written.
    """
    acc, parts = math(x, lora_as[0]), planes(x.shape[1], routing.tile, lora_as[0].dtype)
    s = x.new_empty(parts, x.shape[0], sum(ranks_of(lora_as)), dtype=acc.torch)
    write_shrunk(x, lora_as, s, routing, slots)
    return s


def expand_(ys: Sequence[Tensor], s: Tensor, lora_bs: Sequence[Tensor], routing, slots) -> None:
    """``y_p += S_p B_pᵀ`` for each token that has an adapter, in place."""
    add_expanded(ys, s, lora_bs, routing, slots._replace(thresholds=None), total=False)


def add_(ys: Sequence[Tensor], x: Tensor, lora_as: Sequence[Tensor], lora_bs: Sequence[Tensor], routing, slots) -> None:
    """``forward`` where nobody asks for S."""
    forward(ys, x, lora_as, lora_bs, routing, slots)


def describe(x: Tensor, lora_as: Sequence[Tensor], *_) -> list[str]:
    """The kernel configurations of a call, for ``fastpeft.explain``: few tokens a tile, and many."""
    columns, dtype, lines = sum(ranks_of(lora_as)), lora_as[0].dtype, []
    for tile in (DECODE, 4 * DECODE):
        lines += [f"{step}: {config(step, columns, dtype, tile)}" for step in ("shrink", "expand", "outer")]
        lines.append(f"K={x.shape[-1]} in {planes(x.shape[-1], tile, dtype)} sums")
    return lines
