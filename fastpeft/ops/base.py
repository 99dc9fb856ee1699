"""A frozen weight in 4 or 8 bits, and how an op takes one in place of a dense weight.

An op that does (``lora_linear``, ``lora_mlp``) is handed its tensors and writes W into a scratch buffer where the GEMM
reads it, and again in backward; W is never kept. The weights of a call follow one another in the scratch. At training
sizes this beats a GEMM that reads the codes, which would decode them again for every block of rows.
"""

import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _backend
from .._plan import unrecorded
from .base_scratch import Scratch

TABLES = 5  # tensors of a Base beside its codes
LAYOUT = 4  # and numbers: N, K, block, block2
_writers: "weakref.WeakValueDictionary[int, _Writer]" = weakref.WeakValueDictionary()  # by their numbers in layouts
_numbers = itertools.count(1)


class Base(NamedTuple):
    """A frozen weight in 4 or 8 bits, in place of ``weight [N, K]``; made by ``four_bit`` or ``eight_bit``.

    Attributes:
        codes: uint8 ``[N·K / 2]``, two elements a byte, the first in the high half; or int8 ``[N, K]``.
        absmax: the scales of blocks, float32, or uint8 where they are nested; for int8 ``[N]``.
        code: float32 ``[16]``, the value of each code; empty for int8.
        absmax2: float32, the scales of the scales; empty where they are not nested.
        code2: float32 ``[256]``, the value of each code in absmax; empty where it is not nested.
        offset: float32, one element; empty where it is not nested.
        shape: N and K.
        block: elements that share a scale.
        block2: scales that share a scale.
        dtype: in which its library multiplies by it; None: in that of x.
    """

    codes: Tensor
    absmax: Tensor
    code: Tensor
    absmax2: Tensor
    code2: Tensor
    offset: Tensor
    shape: tuple[int, int]
    block: int
    block2: int
    dtype: torch.dtype | None

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.codes.device

    @property
    def _version(self) -> int:
        return self.codes._version


def four_bit(
    codes: Tensor,
    absmax: Tensor,
    code: Tensor,
    shape: Sequence[int],
    block: int = 64,
    dtype: torch.dtype | None = None,
    nested: tuple[Tensor, Tensor, Tensor, int] | None = None,
) -> Base:
    """A weight in NF4, FP4 or any other code of 16 values.

    Args:
        codes: two elements a byte, row by row, the first in the high half; any dtype, whose bytes are meant.
        absmax: one for each block; float32, or uint8 where ``nested`` is given.
        code: float32 ``[16]``, the value of each code.
        shape: N and K.
        block: elements that share a scale, a power of 2, and 2 at least.
        dtype: in which its library multiplies by it; None: in that of x.
        nested: absmax2, code2 ``[256]``, offset (float32 each) and the number of scales that share one in absmax2.

    Raises:
        TypeError: a tensor has another dtype.
        ValueError: a tensor has another size, or is not contiguous.
    """
    n, k = (int(size) for size in shape)
    absent = code.new_empty(0)
    absmax2, code2, offset, block2 = nested or (absent, absent, absent, 1)
    if block < 2 or block & (block - 1):
        raise ValueError(f"four_bit: block is {block}, expected a power of 2")
    flat = _contiguous("codes", codes).view(-1).view(torch.uint8)
    blocks = -(-n * k // block)
    _table("codes", flat, torch.uint8, -(-n * k // 2))
    _table("absmax", absmax, torch.uint8 if nested else torch.float32, blocks)
    _table("code", code, torch.float32, 16)
    if nested:
        _table("nested absmax", absmax2, torch.float32, -(-blocks // block2))
        _table("nested code", code2, torch.float32, 256)
        _table("offset", offset, torch.float32, 1)
    return Base(flat, absmax.view(-1), code, absmax2, code2, offset, (n, k), block, block2, dtype)


def eight_bit(codes: Tensor, absmax: Tensor, dtype: torch.dtype | None = None) -> Base:
    """A weight in int8 with a scale for each row.

    Args:
        codes: int8 ``[N, K]``.
        absmax: float32 ``[N]``, what 127 stands for.
        dtype: in which its library multiplies by it; None: in that of x.

    Raises:
        TypeError: a tensor has another dtype.
        ValueError: a tensor has another size, or is not contiguous.
    """
    if codes.dim() != 2:
        raise ValueError(f"eight_bit: codes has shape {list(codes.shape)}, expected [N, K]")
    n, k = codes.shape
    _table("codes", codes, torch.int8, n * k)
    _table("absmax", absmax, torch.float32, n)
    absent = absmax.new_empty(0)
    return Base(codes, absmax.view(-1), absent, absent, absent, absent, (n, k), k, 1, dtype)


class _Writer:
    """The function behind a ``Base`` of another library; the tensor that stands for its codes keeps it."""

    def __init__(self, function: Callable[[], Tensor]):
        self.function = function


def written_by(
    function: Callable[[], Tensor], shape: Sequence[int], device: torch.device | str, dtype: torch.dtype | None = None
) -> Base:
    """A weight in a format of which nothing is known here but how it is written out.

    Args:
        function: gives W ``[N, K]`` in a floating-point dtype, on ``device``; asked anew in forward and in backward.
        shape: N and K.
        device: where W is.
        dtype: in which its library multiplies by it; None: in that of x.
    """
    n, k = (int(size) for size in shape)
    absent, number = torch.empty(0, device=device), next(_numbers)
    codes: Any = torch.empty(1, dtype=torch.uint8, device=device)
    codes.fastpeft_writer = _writers[number] = _Writer(function)
    return Base(codes, absent, absent, absent, absent, absent, (n, k), 1, -number, dtype)


def opaque(number: int, shape: Sequence[int], like: torch.dtype) -> Tensor:
    """What the function of ``written_by`` gives, in this dtype; ``number`` is the ``block2`` of its ``Base``."""
    writer = _writers.get(-number)
    if writer is None:
        raise RuntimeError("Base: the layer that a weight was to be read from is gone")
    unrecorded("weights that another library writes out")
    with torch.no_grad():
        weight = writer.function()
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or tuple(weight.shape) != tuple(shape):
        found = f"{list(weight.shape)} in {weight.dtype}" if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(f"Base: a weight was written out as {found}, expected {list(shape)} in a floating-point dtype")
    return weight.detach().to(like)


def parts(weights: Sequence) -> tuple[list, list[Tensor], list[int]]:
    """Weights as an op's schema has them: the tensors, the tables behind their codes, and their layouts.

    Args:
        weights: tensors, ``Base``s, or None.

    Returns:
        A tensor or None for each; the tables of the quantised ones; four numbers for each weight, 0 for a dense one, or
        no numbers where all are dense.
    """
    if not any(isinstance(weight, Base) for weight in weights):
        return list(weights), [], []
    tensors: list[Tensor | None] = []
    tables: list[Tensor] = []
    layouts: list[int] = []
    for weight in weights:
        quantised = isinstance(weight, Base)
        tensors.append(weight.codes if quantised else weight)
        tables.extend(weight[1 : 1 + TABLES] if quantised else ())
        layouts.extend((*weight.shape, weight.block, weight.block2) if quantised else (0,) * LAYOUT)
    return tensors, tables, layouts


def shapes(weights: Sequence[Tensor | None], layouts: Sequence[int]) -> list[tuple[int, int] | None]:
    """N and K of every quantised weight; None for the others."""
    found = layouts or (0,) * (LAYOUT * len(weights))
    return [(found[i], found[i + 1]) if found[i + 2] else None for i in range(0, len(found), LAYOUT)]


class Written:
    """Weights as ``parts`` gave them, all dense, each for as long as the next has not been asked for.

    Args:
        like: a tensor in whose dtype and on whose device they are written.
        weights: the tensors; what is dense, or empty, is handed out as it is.
        tables: of the quantised ones.
        layouts: of all, or none.
        backend: by which they are written.
    """

    def __init__(self, like: Tensor, weights: Sequence, tables: Sequence, layouts: Sequence[int], backend: str):
        self.like, self.weights, self.tables, self.layouts, self.backend = like, weights, tables, layouts, backend

    def __len__(self) -> int:
        return len(self.weights)

    def __iter__(self) -> Iterator[Tensor]:
        found = shapes(self.weights, self.layouts)
        impl, scratch = _backend.load("dequantise", self.backend), Scratch(self.like, self.backend)
        own = [size for p, size in enumerate(found) if size and self.layouts[LAYOUT * p + 3] > 0]
        scratch.take(1, max((n * k for n, k in own), default=0))
        tables = iter(self.tables)
        for p, (weight, shape) in enumerate(zip(self.weights, found, strict=True)):
            if shape is None:
                yield weight
                continue
            given = [next(tables) for _ in range(TABLES)]
            block, block2 = self.layouts[LAYOUT * p + 2 : LAYOUT * (p + 1)]
            if block2 < 0:
                yield opaque(block2, shape, self.like.dtype)
                continue
            out = scratch.take(*shape)
            impl.write(out, weight, *given, block, block2)
            yield out
        scratch.done()

    def apart(self) -> list[Tensor]:
        """All of them at once, the quantised ones in memory of their own."""
        return [w if w is given else w.clone() for w, given in zip(self, self.weights, strict=True)]


def _contiguous(name: str, tensor: Tensor) -> Tensor:
    if not tensor.is_contiguous():
        raise ValueError(f"Base: {name} has strides {tensor.stride()}, expected a contiguous tensor")
    return tensor


def _table(name: str, tensor: Tensor, dtype: torch.dtype, count: int) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"Base: {name} has dtype {tensor.dtype}, expected {dtype}")
    if _contiguous(name, tensor).numel() != count:
        raise ValueError(f"Base: {name} has {tensor.numel()} elements, expected {count}")
