"""What dora_linear accepts: each check names the op, the argument, what it is and what was expected."""

import torch
from torch import Tensor

from .. import _backend, _check
from . import lora_linear_arguments
from .lora_linear_backends import REASONS as LINEAR_REASONS

_OP = "dora_linear"


def tensors(x, weight, quantised, lora_a, lora_b, magnitude, bias, norm) -> None:
    """Shapes, dtypes and devices; ``quantised`` has the weight's shape where it is."""
    lora_linear_arguments.branches(_OP, False, x, [weight], [quantised], [lora_a], [lora_b], [bias])
    sizes = {"N": lora_b.shape[0]}
    _check.tensor(_OP, "magnitude", magnitude, ("N",), sizes, x)
    _check.dtype(_OP, "magnitude", magnitude, x.dtype, lora_a.dtype)
    if norm is not None:
        _check.tensor(_OP, "norm", norm, ("N",), sizes, x)
        _check.dtype(_OP, "norm", norm, torch.promote_types(lora_a.dtype, torch.float32))
    if torch.is_grad_enabled() and quantised is None and weight.requires_grad:
        raise ValueError(f"{_OP}: weight asks for a gradient, expected a frozen one")


def numbers(scale: float, dropout: float) -> tuple[float, float]:
    """Scale and dropout as Python's floats."""
    (scale,), (dropout,) = lora_linear_arguments.numbers(_OP, False, [scale], [dropout])
    return scale, dropout


def seeds(seed, dropout: float, x: Tensor) -> Tensor:
    """int64 ``[1]``; empty where nothing is dropped."""
    return lora_linear_arguments.seeds(_OP, False, [seed], [dropout], x)


REASONS = {
    "cuda": lambda *_: _backend.cuda_missing() or "fastpeft._C has no DoRA",
    "triton": LINEAR_REASONS["triton"],
    "reference": lambda *_: None,
}


def facts(given: dict) -> tuple:
    """What ``REASONS`` look at, of the arguments of ``dora_linear`` by name."""
    weights = [getattr(given["weight"], "codes", given["weight"])] if "weight" in given else []
    return given["x"], [given["lora_a"]], weights
