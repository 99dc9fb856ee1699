"""What lora_mlp accepts: each check names the op, the argument, what it is and what was expected."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _backend, _check
from ..reference.lora_mlp import ACTIVATIONS
from . import lora_linear_arguments
from .lora_linear_backends import REASONS as LINEAR_REASONS

_SIZES = ("I", "K"), ("I", "K"), ("N", "I")  # of the weights


def lists(weights: Sequence, given: dict[str, Sequence | None]) -> list[Sequence]:
    """Every list with its three items, those that are not given by their defaults."""
    _check.items("lora_mlp", "weights", weights, 3)
    return lora_linear_arguments.lists("lora_mlp", weights, given)


def tensors(
    x: Tensor,
    weights: Sequence,
    quantised: Sequence,
    lora_as: Sequence,
    lora_bs: Sequence,
    biases: Sequence,
    op: str = "lora_mlp",
) -> None:
    """Shapes, dtypes and devices of the three projections; ``quantised`` has the shapes of those weights that are."""
    sizes, adapter = {"K": x.shape[-1]}, None
    for p, (weight, shape, a, b, bias) in enumerate(zip(weights, quantised, lora_as, lora_bs, biases, strict=True)):
        n, k = _SIZES[p]
        if shape is not None:
            lora_linear_arguments.quantised_weight(op, ("weights", p), weight, shape, (n, k), sizes, x)
        else:
            _check.tensor(op, ("weights", p), weight, (n, k), sizes, x)
            _check.dtype(op, ("weights", p), weight, x.dtype)
        ranks = dict(sizes)  # each projection has a rank of its own
        _check.tensor(op, ("lora_as", p), a, ("r", k), ranks, x)
        _check.tensor(op, ("lora_bs", p), b, (n, "r"), ranks, x)
        if a.dtype != x.dtype:
            _check.dtype(op, ("lora_as", p), a, x.dtype, torch.promote_types(x.dtype, torch.float32))
        adapter = adapter or a.dtype
        _check.dtype(op, ("lora_as", p), a, adapter)
        _check.dtype(op, ("lora_bs", p), b, adapter)
        if a.shape[0] == 0:
            raise ValueError(f"{op}: lora_as[{p}] has r=0, expected r>=1")
        if bias is not None:
            _check.tensor(op, ("biases", p), bias, (n,), sizes, x)
            _check.dtype(op, ("biases", p), bias, x.dtype, adapter)


def activation(name: str, op: str = "lora_mlp") -> str:
    _check.one_of(op, "activation", name, ACTIVATIONS)
    return name


def _triton_reason(x, lora_as, *_):
    reason = LINEAR_REASONS["triton"]
    return reason(x, lora_as[:2]) or reason(x, lora_as[2:])


REASONS = {
    "cuda": lambda *_: _backend.cuda_missing() or "fastpeft._C has no gated MLP",
    "triton": _triton_reason,
    "reference": lambda *_: None,
}


def facts(given: dict) -> tuple:
    """What ``REASONS`` look at, of the arguments of ``lora_mlp`` by name."""
    return given["x"], given["lora_as"], given.get("weights", ())
