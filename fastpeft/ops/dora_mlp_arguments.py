"""What dora_mlp accepts: lora_mlp's lists, and of each projection a magnitude and the rows' norms."""

from collections.abc import Sequence

import torch

from .. import _check
from . import lora_linear_arguments, lora_mlp_arguments

OP = "dora_mlp"


def lists(weights: Sequence, given: dict[str, Sequence | None]) -> list[Sequence]:
    """Every list with its three items, those that are not given by their defaults."""
    _check.items(OP, "weights", weights, 3)
    norms = given.pop("norms")
    found = lora_linear_arguments.lists(OP, weights, given)
    return [*found, [None] * 3 if norms is None else _check.items(OP, "norms", norms, 3)]


def tensors(x, weights, quantised, lora_as, lora_bs, magnitudes, biases, norms) -> None:
    """Shapes, dtypes and devices of the three projections; ``quantised`` has the shapes of those weights that are."""
    lora_mlp_arguments.tensors(x, weights, quantised, lora_as, lora_bs, biases, OP)
    adapter: torch.dtype = lora_as[0].dtype
    for p, (magnitude, norm, b) in enumerate(zip(magnitudes, norms, lora_bs, strict=True)):
        sizes = {"IIN"[p]: b.shape[0]}
        if magnitude is not None:
            _check.tensor(OP, ("magnitudes", p), magnitude, tuple(sizes), sizes, x)
            _check.dtype(OP, ("magnitudes", p), magnitude, x.dtype, adapter)
        if norm is not None:
            if magnitude is None:
                raise ValueError(f"{OP}: norms[{p}] is given, expected None where magnitudes[{p}] is None")
            _check.tensor(OP, ("norms", p), norm, tuple(sizes), sizes, x)
            _check.dtype(OP, ("norms", p), norm, torch.promote_types(adapter, torch.float32))
        if torch.is_grad_enabled() and quantised[p] is None and weights[p].requires_grad:
            raise ValueError(f"{OP}: weights[{p}] asks for a gradient, expected a frozen one")
