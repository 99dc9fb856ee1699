"""What the definition of bottleneck and its steps share: the tensors, the settings, activations, mask and norm."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._mask import threshold
from .dropout import drawn_mask

LEAKY_SLOPE = 0.01
ACTIVATIONS = {
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "leaky_relu": lambda z: F.leaky_relu(z, LEAKY_SLOPE),
    "identity": lambda z: z,
}
NORMS = ("layer", "rms")


class Weights(NamedTuple):
    """The tensors of one adapter, or of ``S`` adapters with a leading dimension of slots; None where there is none.

    Attributes:
        down: ``[H, K]``; down_bias: ``[H]``; up: ``[N, H]``; up_bias: ``[N]``; scale: ``[1]`` or ``[N]``, if learned;
            norm_weight, norm_bias: ``[K]``.
    """

    down: Tensor
    down_bias: Tensor | None
    up: Tensor
    up_bias: Tensor | None
    scale: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None

    def of(self, slot: int) -> "Weights":
        """Those of one slot."""
        return Weights._make(None if t is None else t[slot] for t in self)


class Settings(NamedTuple):
    """What is no tensor. ``scale`` is 1 where it is learned; ``own``: the residual is x itself."""

    activation: str
    scale: float
    norm: str
    eps: float
    dropout: float
    own: bool


def given(tensor: Tensor | None) -> Tensor:
    """What the caller knows to be there."""
    if tensor is None:
        raise ValueError("bottleneck: a tensor is None that the settings ask for")
    return tensor


def mask_of(like: Tensor, rows: int, columns: int, settings: Settings, seed: Tensor | None) -> Tensor | None:
    """Which elements of the branch stay, 1 or 0 in the dtype of ``like``; None where nothing is dropped."""
    return drawn_mask(seed, settings.dropout, rows, columns, like.dtype) if threshold(settings.dropout) else None


def scaled_up(weights: Weights) -> tuple[Tensor, Tensor | None]:
    """The up projection and its bias times the learned scale."""
    up, up_bias, scale = weights.up, weights.up_bias, weights.scale
    if scale is None:
        return up, up_bias
    return up * scale[:, None], None if up_bias is None else up_bias * scale


def normalised(x: Tensor, weights: Weights, settings: Settings) -> tuple[Tensor, tuple[Tensor, ...]]:
    """norm(x), and of every row its mean, under a LayerNorm, and 1 / deviation."""
    if settings.norm == "layer":
        a, *stats = torch.native_layer_norm(x, x.shape[1:], weights.norm_weight, weights.norm_bias, settings.eps)
        return a, tuple(stats)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rstd = wide.square().mean(1).add_(settings.eps).rsqrt_()
    a = (x * rstd[:, None]).mul_(given(weights.norm_weight))
    a = a if weights.norm_bias is None else a.add_(weights.norm_bias)
    return a.to(x.dtype), (rstd,)


def product(left: Tensor, right: Tensor, factor: float) -> Tensor:
    """``factor · left right``, rounded once."""
    if factor == 1.0:
        return left @ right
    return left.new_empty(left.shape[0], right.shape[1]).addmm_(left, right, beta=0, alpha=factor)
