"""What bottleneck accepts: each check names the op, the argument, what it is and what was expected."""

import torch
from torch import Tensor

from .. import _check
from .._mask import threshold
from ..reference.bottleneck_terms import ACTIVATIONS, NORMS, Weights

OP = "bottleneck"


def weights(x: Tensor, given: Weights, grouped: bool) -> dict[str, int]:
    """Shapes, dtypes and device of one adapter's tensors, or of S adapters'; returns the sizes K, H, N (and S)."""
    sizes = {"K": x.shape[-1]}
    down, _, up, _, scale, norm_weight, norm_bias = given
    _tensor("down_weight", down, ("H", "K"), sizes, x, grouped)
    _check.dtype(OP, "down_weight", down, x.dtype, torch.promote_types(x.dtype, torch.float32))
    _tensor("up_weight", up, ("N", "H"), sizes, x, grouped)
    if down.shape[-2] == 0 or 0 in down.shape[:-2]:
        raise ValueError(f"{OP}: down_weight has shape {list(down.shape)}, expected {'S>=1 and ' * grouped}H>=1")
    if norm_bias is not None and norm_weight is None:
        raise ValueError(f"{OP}: norm_bias is given without norm_weight, expected both or norm_weight alone")
    if scale is not None:
        _tensor("scale", scale, ("scales",), dict(sizes), x, grouped)
        if scale.shape[-1] not in (1, sizes["N"]):
            raise ValueError(f"{OP}: scale has {scale.shape[-1]} elements, expected 1 or N={sizes['N']}")
    vectors = ("down_bias", "H"), ("up_bias", "N"), ("norm_weight", "K"), ("norm_bias", "K")
    tensors = given.down_bias, given.up_bias, norm_weight, norm_bias
    for (name, size), value in zip(vectors, tensors, strict=True):
        if value is not None:
            _tensor(name, value, (size,), sizes, x, grouped)
    names = "up_weight", "down_bias", "up_bias", "scale", "norm_weight", "norm_bias"
    for name, value in zip(names, (up, given.down_bias, given.up_bias, scale, norm_weight, norm_bias), strict=True):
        if value is not None:
            _check.dtype(OP, name, value, down.dtype)
    return sizes


def _tensor(name, value, dimensions, sizes, x, grouped):
    _check.tensor(OP, name, value, ("S", *dimensions) if grouped else dimensions, sizes, x)


def residual(value: Tensor, x: Tensor, sizes: dict[str, int]) -> None:
    """``[..., N]`` in x's dtype, or in float32 beside 16-bit x as autocast makes it."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{OP}: residual is {_check.shown(value)}, expected None or a tensor [..., N]")
    shape = [*x.shape[:-1], sizes["N"]]
    if list(value.shape) != shape or value.device != x.device:
        raise ValueError(
            f"{OP}: residual is {list(value.shape)} on {value.device}, expected {shape} (N={sizes['N']}) on {x.device}"
        )
    _check.dtype(OP, "residual", value, x.dtype, torch.promote_types(x.dtype, torch.float32))


def settings(activation: str, norm: str, eps: float) -> float:
    """Names that exist, and eps as a number of at least 0."""
    _check.one_of(OP, "activation", activation, ACTIVATIONS)
    _check.one_of(OP, "norm", norm, NORMS)
    number = _check.finite(OP, "eps", eps)
    if number < 0:
        raise ValueError(f"{OP}: eps is {number}, expected a number of at least 0")
    return number


def seed(value: int | Tensor | None, dropout: float, count: int | None, device: torch.device) -> Tensor | None:
    """None where nothing is dropped, else int64 ``[1]``, or ``[S]``: None is then drawn for every slot."""
    if not threshold(dropout):
        return None
    if count is not None and value is None:
        return torch.randint(1 << 62, (count,), dtype=torch.int64, device=device)
    if count is not None and isinstance(value, Tensor) and value.numel() != 1:
        if value.dtype != torch.int64 or value.shape != (count,) or value.device != device:
            raise ValueError(
                f"{OP}: seed is {value.dtype} {list(value.shape)} on {value.device}, "
                f"expected torch.int64 [1] or [{count}] on {device}"
            )
        return value.contiguous()
    return _check.seed(OP, "seed", value, device)
