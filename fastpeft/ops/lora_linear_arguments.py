"""What lora_linear accepts: each check names the op, the argument, what it is and what was expected."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .. import _check
from .._mask import threshold

_ONE = ("weight", "lora_a", "lora_b", "bias")
_SHARED = ("weights", "lora_as", "lora_bs", "biases")


def lists(op: str, weights: Sequence, given: Mapping[str, Sequence | None]) -> list[Sequence]:
    """The shared form's lists, an item for each of the weights; those that are not given by their defaults."""
    count = len(_check.items(op, "weights", weights))
    if count == 0:
        raise ValueError(f"{op}: weights has 0 items, expected at least 1")
    defaults = {"biases": None, "scales": 1.0, "dropouts": 0.0, "seeds": None}
    found = []
    for name, values in given.items():
        absent = values is None and name in defaults
        found.append([defaults[name]] * count if absent else _check.items(op, name, values, count))
    return found


def branches(
    op: str,
    shared: bool,
    x: Tensor,
    weights: Sequence,
    quantised: Sequence,
    lora_as: Sequence,
    lora_bs: Sequence,
    biases,
) -> None:
    """Shapes, dtypes and devices of every projection; ``quantised`` has the shapes of those weights that are."""
    first = None
    for p, tensors in enumerate(zip(weights, quantised, lora_as, lora_bs, biases, strict=True)):
        names = [(name, p) for name in _SHARED] if shared else _ONE
        first = _branch(op, names, x, *tensors, first)


def _branch(op, names, x, weight, quantised, a, b, bias, first) -> torch.dtype:
    """Returns the adapters' dtype, which the ``first`` of them decides."""
    weight_name, a_name, b_name, bias_name = names
    sizes = {"K": x.shape[-1]}
    if quantised is not None:
        quantised_weight(op, weight_name, weight, quantised, ("N", "K"), sizes, x)
    elif weight is not None:
        _check.tensor(op, weight_name, weight, ("N", "K"), sizes, x)
        _check.dtype(op, weight_name, weight, x.dtype)
    _check.tensor(op, a_name, a, ("r", "K"), sizes, x)
    _check.tensor(op, b_name, b, ("N", "r"), sizes, x)
    if a.dtype != x.dtype:
        _check.dtype(op, a_name, a, x.dtype, torch.promote_types(x.dtype, torch.float32))
    first = first or a.dtype
    _check.dtype(op, a_name, a, first)
    _check.dtype(op, b_name, b, first)
    if a.shape[0] == 0:
        raise ValueError(f"{op}: {_check.label(a_name)} has r=0, expected r>=1")
    if bias is not None:
        _check.tensor(op, bias_name, bias, ("N",), sizes, x)
        _check.dtype(op, bias_name, bias, x.dtype, first)
    return first


def quantised_weight(op, name, codes, shape, dims, sizes, x) -> None:
    """Device and sizes of a quantised weight; a size that is not known yet is its."""
    if codes.device != x.device:
        raise ValueError(f"{op}: {_check.label(name)} is on {codes.device}, expected {x.device}")
    for dim, size in zip(dims, shape, strict=True):
        if sizes.setdefault(dim, size) != size:
            raise ValueError(f"{op}: {_check.label(name)} has {dim}={size}, expected {dim}={sizes[dim]}")


def numbers(op: str, shared: bool, scales: Sequence, dropouts: Sequence) -> tuple[list[float], list[float]]:
    """Scales and dropouts as Python's floats."""
    if not shared:
        return [_check.finite(op, "scale", scales[0])], [_check.probability(op, "dropout", dropouts[0])]
    return (
        [_check.finite(op, ("scales", p), scale) for p, scale in enumerate(scales)],
        [_check.probability(op, ("dropouts", p), dropout) for p, dropout in enumerate(dropouts)],
    )


def seeds(op: str, shared: bool, given: Sequence, dropouts: Sequence[float], x: Tensor) -> Tensor:
    """int64 ``[P]``, a seed for each projection; empty where nothing is dropped."""
    if not any(map(threshold, dropouts)):
        return x.new_empty(0)
    names: list[_check.Name] = [("seeds", p) for p in range(len(given))] if shared else ["seed"]
    drawn = [_check.seed(op, name, seed, x.device) for name, seed in zip(names, given, strict=True)]
    return drawn[0] if len(drawn) == 1 else torch.cat(drawn)
