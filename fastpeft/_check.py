"""The one place for shape, dtype and device errors: op, argument, what was given, what was expected."""

import math
from collections.abc import Sized

import torch
from torch import Tensor


def shown(value: object) -> str:
    """What was given, for an error: a short value with its type, the size alone of anything long.

    >>> shown("2.0"), shown([1, 2, 3])
    ("'2.0' (str)", 'a list of 3')
    """
    kind = type(value).__name__
    if value is None or isinstance(value, bool):
        return repr(value)
    if isinstance(value, Tensor) and value.dim():
        return f"a {kind} {list(value.shape)} of {value.dtype}"
    if isinstance(value, (str, bytes)):
        return f"{value!r} ({kind})" if len(value) <= 80 else f"{value[:60]!r}... ({kind} of {len(value)})"
    if isinstance(value, Sized) and not isinstance(value, (type, Tensor)):
        return f"a {kind} of {len(value)}"
    text = repr(value)
    return f"{text if len(text) <= 80 else text[:60] + '...'} ({kind})"


def tensor(
    op: str, name: str, value: object, dimensions: tuple[str, ...], sizes: dict[str, int], like: Tensor
) -> Tensor:
    """Check one argument against names of dimensions such as ``("N", "K")``; a new name takes the tensor's size.

    ``sizes`` is shared by the checks of one call, so that the first tensor to name a dimension defines it.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} is {type(value).__name__}, expected a tensor [{', '.join(dimensions)}]")
    shape = value.shape
    if len(shape) != len(dimensions):
        raise ValueError(f"{op}: {name} has shape {list(shape)}, expected [{', '.join(dimensions)}]")
    if not value.is_floating_point():
        raise TypeError(f"{op}: {name} has dtype {value.dtype}, expected a floating-point dtype")
    if value.device != like.device:
        raise ValueError(f"{op}: {name} is on {value.device}, expected {like.device}")
    for dimension, size in zip(dimensions, shape, strict=True):
        if sizes.setdefault(dimension, size) != size:
            raise ValueError(f"{op}: {name} has {dimension}={size}, expected {dimension}={sizes[dimension]}")
    return value


def dtype(op: str, name: str, value: Tensor, *expected: torch.dtype) -> None:
    """``value`` has one of the expected dtypes."""
    if value.dtype not in expected:
        wanted = " or ".join(str(d) for d in dict.fromkeys(expected))
        raise TypeError(f"{op}: {name} has dtype {value.dtype}, expected {wanted}")


def finite(op: str, name: str, value: float) -> float:
    """A finite real number."""
    if not isinstance(value, (int, float)) or not -math.inf < value < math.inf:
        raise ValueError(f"{op}: {name} is {value}, expected a finite number")
    return float(value)


def probability(op: str, name: str, value: float) -> float:
    """A number in [0, 1)."""
    if not isinstance(value, (int, float)) or not 0.0 <= value < 1.0:
        raise ValueError(f"{op}: {name} is {value}, expected a number in [0, 1)")
    return float(value)


def positive(op: str, name: str, value: int) -> int:
    """An integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{op}: {name} is {value!r}, expected an integer of at least 1")
    return value


def seed(op: str, name: str, value: int | Tensor | None, device: torch.device) -> Tensor:
    """One int64 element ``[1]`` on ``device``; None draws it from torch's generator, which checkpointing restores."""
    if value is None:
        return torch.randint(1 << 62, (1,), dtype=torch.int64, device=device)
    if isinstance(value, Tensor):
        if value.dtype != torch.int64 or value.numel() != 1 or value.device != device:
            raise ValueError(
                f"{op}: {name} is {value.dtype} {list(value.shape)} on {value.device}, "
                f"expected one torch.int64 element on {device}"
            )
        return value.reshape(1)
    if isinstance(value, bool) or not isinstance(value, int) or not -(1 << 63) <= value < 1 << 63:
        raise ValueError(f"{op}: {name} is {value!r}, expected None, a 64-bit integer or an int64 tensor")
    return torch.tensor([value], dtype=torch.int64, device=device)
