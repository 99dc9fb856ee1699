"""The four memory-bound steps of a LoRA linear layer; the base GEMMs around them belong to cuBLAS.

    down            S  = scale · drop(x) Aᵀ            one read of x for all branches
    up              Y  = S Bᵀ + bias                   one write of Y
    up_backward     dS = scale · dY B, dB = dYᵀ S      one read of dY, up to rank 16
    down_backward   dX = mask ∘ (dS A) / (1 - p)       the up kernel with a mask
                    dA = dSᵀ drop(x)                   one read of x for all branches

Alphabet: x [M, K] or dY [M, N] has rows m and columns k; S has columns r < R. Branches are groups of columns of S.
x may be 16-bit while A, B and S are float32, and is never widened in memory: beside bfloat16 these are multiplied as
bfloat16 planes (``planes.py``), beside float16 in three TF32 terms, both on tensor cores. Sums that cross programs go
through partial results.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .launch import capability
from .lora_linear_backward import down_backward, up_backward, ups_backward
from .lora_linear_backward import run as backward
from .lora_linear_products import STEPS, config, expand, project, ranks_of, stacked

__all__ = [
    "STEPS",
    "backward",
    "config",
    "describe",
    "down",
    "down_backward",
    "forward",
    "up",
    "up_backward",
    "ups_backward",
]


def forward(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    biases: Sequence[Tensor],
    scales: Sequence[float],
    dropouts: Sequence[float],
    seeds: Tensor,
) -> tuple[list[Tensor], Tensor]:
    """y of every projection, and S ``[M, R]``; absent weights and biases are empty tensors."""
    s = down(x, lora_as, scales, dropouts, seeds)
    ys = []
    for weight, b, bias, s_p in zip(weights, lora_bs, biases, s.split(ranks_of(lora_as), 1), strict=True):
        y = up(s_p, b, bias if bias.numel() else None, x.dtype)
        ys.append(y.addmm_(x, weight.T) if weight.numel() else y)
    return ys, s


def down(
    x: Tensor,
    lora_as: Sequence[Tensor],
    scales: Sequence[float],
    dropouts: Sequence[float],
    seeds: Tensor,
    first: int = 0,
) -> Tensor:
    """``S_p = scale_p · drop_p(x) A_pᵀ`` side by side: ``[M, R]`` in A's dtype; ``first`` as in ``down_backward``."""
    return project(x, stacked(lora_as), ranks_of(lora_as), scales, dropouts, seeds, first=first)


def up(s: Tensor, b: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``S Bᵀ + bias``: ``[M, N]`` in ``dtype``."""
    return expand(s, b, bias, dtype, [b.shape[1]], [0.0], None)


def describe(x: Tensor, lora_as: Sequence[Tensor], *_) -> list[str]:
    """The kernel configurations of a call, for ``fastpeft.explain``."""
    rank, dtype = sum(ranks_of(lora_as)), lora_as[0].dtype
    return [f"{step}: {config(step, rank, dtype, capability(x))}" for step in STEPS]
