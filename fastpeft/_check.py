"""The one place for shape, dtype and device errors: op, argument, what was given, what was expected."""

import math
import numbers
import operator
import re
from collections.abc import Collection, Sequence, Sized
from typing import Any, cast

import torch
from torch import Tensor

FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
PLAIN = frozenset({Tensor, torch.nn.Parameter})  # what is no subclass with behaviour of its own

# An argument, or one item of an argument that is a list: put together only where there is something to say.
Name = str | tuple[str, int]


def label(name: Name) -> str:
    """An argument's name in errors: ``lora_a``, or ``lora_as[1]`` for an item of a list."""
    return name if isinstance(name, str) else f"{name[0]}[{name[1]}]"


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


def listed(values: Collection) -> str:
    """All of a short list, the beginning of a long one, for an error."""
    text = str(list(values)[:20])
    return text if len(values) <= 20 and len(text) <= 200 else f"{text[:60]}... ({len(values)} items)"


def floating(op: str, name: Name, value: object, dimensions: str = "[..., K]") -> Tensor:
    """A tensor of a floating-point dtype with at least one dimension."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {label(name)} is {shown(value)}, expected a tensor {dimensions}")
    if value.dim() == 0:
        raise TypeError(f"{op}: {label(name)} is a scalar, expected a tensor {dimensions}")
    if value.dtype not in FLOATS:
        raise TypeError(
            f"{op}: {label(name)} has dtype {value.dtype}, expected a floating-point dtype of 16, 32 or 64 bits"
        )
    return value


def tensor(
    op: str, name: Name, value: object, dimensions: tuple[str, ...], sizes: dict[str, int], like: Tensor
) -> Tensor:
    """Check one argument against names of dimensions such as ``("N", "K")``; a new name takes the tensor's size.

    ``sizes`` is shared by the checks of one call, so that the first tensor to name a dimension defines it.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {label(name)} is {shown(value)}, expected a tensor [{', '.join(dimensions)}]")
    shape = value.shape
    if len(shape) != len(dimensions):
        raise ValueError(f"{op}: {label(name)} has shape {list(shape)}, expected [{', '.join(dimensions)}]")
    if not value.is_floating_point():
        raise TypeError(f"{op}: {label(name)} has dtype {value.dtype}, expected a floating-point dtype")
    if value.device != like.device:
        raise ValueError(f"{op}: {label(name)} is on {value.device}, expected {like.device}")
    for dimension, size in zip(dimensions, shape, strict=True):
        if sizes.setdefault(dimension, size) != size:
            raise ValueError(f"{op}: {label(name)} has {dimension}={size}, expected {dimension}={sizes[dimension]}")
    return value


def dtype(op: str, name: Name, value: Tensor, *expected: torch.dtype) -> None:
    """``value`` has one of the expected dtypes."""
    if value.dtype not in expected:
        wanted = " or ".join(str(d) for d in dict.fromkeys(expected))
        raise TypeError(f"{op}: {label(name)} has dtype {value.dtype}, expected {wanted}")


def items(op: str, name: str, values: Any, count: int | None = None) -> Sequence:
    """A list of ``count`` items, or of any number; a tensor is none, though it has a length."""
    if type(values) not in (list, tuple) and not _is_sequence(values):
        raise TypeError(f"{op}: {name} is {shown(values)}, expected a list, an item for each projection")
    if count is not None and len(values) != count:
        raise ValueError(f"{op}: {name} has {len(values)} items, expected {count}")
    return cast(Sequence, values)


def _is_sequence(values: Any) -> bool:
    known = isinstance(values, (str, Tensor, dict))
    return isinstance(values, Sized) and hasattr(values, "__getitem__") and not known


def finite(op: str, name: Name, value: float) -> float:
    """A finite real number, of Python or of a library such as numpy; a bool or a tensor is none."""
    number = value if type(value) is float else _real(op, name, value, "a finite number")
    if not -math.inf < number < math.inf:
        raise ValueError(f"{op}: {label(name)} is {number}, expected a finite number")
    return number


def probability(op: str, name: Name, value: float) -> float:
    """A number in [0, 1)."""
    number = value if type(value) is float else _real(op, name, value, "a number in [0, 1)")
    if not 0.0 <= number < 1.0:
        raise ValueError(f"{op}: {label(name)} is {value}, expected a number in [0, 1)")
    return number


def _real(op: str, name: Name, value: Any, expected: str) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"{op}: {label(name)} is {shown(value)}, expected {expected}")
    try:
        return float(value)
    except OverflowError:
        return math.inf


def integer(op: str, name: Name, value: Any, expected: str = "an integer") -> int:
    """An integer, of Python or of a library such as numpy; a bool or a tensor is none."""
    if type(value) is int:
        return value
    if not isinstance(value, (bool, Tensor)):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise ValueError(f"{op}: {label(name)} is {shown(value)}, expected {expected}")


def positive(op: str, name: Name, value: int) -> int:
    """An integer of at least 1."""
    number = integer(op, name, value, "an integer of at least 1")
    if number < 1:
        raise ValueError(f"{op}: {label(name)} is {number}, expected an integer of at least 1")
    return number


def boolean(op: str, name: Name, value: object) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {label(name)} is {shown(value)}, expected True or False")
    return value


def one_of(op: str, name: Name, value: object, expected: Collection) -> None:
    """A word among those expected, or one of the other objects among them itself (None, True, ...)."""
    if not any(value is e or (isinstance(e, str) and isinstance(value, str) and value == e) for e in expected):
        given = shown(value) if not isinstance(value, str) or len(value) > 80 else repr(value)
        raise ValueError(f"{op}: {label(name)} is {given}, expected one of {', '.join(map(str, expected))}")


def seed(op: str, name: Name, value: object, device: torch.device) -> Tensor:
    """One int64 element ``[1]`` on ``device``; None draws it from torch's generator, which checkpointing restores."""
    if value is None:
        return torch.randint(1 << 62, (1,), dtype=torch.int64, device=device)
    if isinstance(value, Tensor):
        if value.dtype != torch.int64 or value.numel() != 1 or value.device != device:
            raise ValueError(
                f"{op}: {label(name)} is {value.dtype} {list(value.shape)} on {value.device}, "
                f"expected one torch.int64 element on {device}"
            )
        return value.reshape(1)
    expected = "None, a 64-bit integer or an int64 tensor"
    number = integer(op, name, value, expected)
    if not -(1 << 63) <= number < 1 << 63:
        raise ValueError(f"{op}: {label(name)} is {shown(number)}, expected {expected}")
    return torch.tensor([number], dtype=torch.int64, device=device)


def integers(op: str, name: Name, values: Any) -> tuple[int, ...]:
    """Integers in a list, a range, an array or a tensor of one dimension, as Python's."""
    try:
        found = list(values.tolist() if hasattr(values, "tolist") else values)
    except TypeError:
        found = [None]
    if isinstance(values, str):
        raise TypeError(f"{op}: {label(name)} is {shown(values)}, expected integers")
    for i, value in enumerate(found):
        try:
            found[i] = integer(op, name, value)
        except ValueError:
            raise TypeError(f"{op}: {label(name)} has {shown(value)}, expected integers") from None
    return tuple(found)


def names(op: str, name: Name, values: Any) -> tuple[str, ...]:
    """Names in a list; a single string is no list, though it could be read as one of letters."""
    if isinstance(values, str):
        raise TypeError(f"{op}: {label(name)} is the string {values!r}, expected a list of names")
    try:
        found = tuple(values)
    except TypeError:
        raise TypeError(f"{op}: {label(name)} is {shown(values)}, expected a list of names") from None
    for value in found:
        if not isinstance(value, str) or not value:
            raise TypeError(f"{op}: {label(name)} has {shown(value)}, expected names")
    return found


def pattern(op: str, name: Name, value: Any) -> str:
    """A regular expression."""
    try:
        re.compile(value)
    except (re.error, TypeError) as error:
        raise ValueError(f"{op}: {label(name)} is {shown(value)}, expected a regular expression ({error})") from None
    return value


def dtype_or_none(op: str, name: Name, value: object) -> torch.dtype | None:
    """A floating-point dtype, or None where something else decides."""
    if value is not None and not (isinstance(value, torch.dtype) and value.is_floating_point):
        raise TypeError(f"{op}: {label(name)} is {shown(value)}, expected a floating-point torch.dtype or None")
    return value
