"""Rows of lora_mlp that are computed at a time: which, with which seeds, and how their results come together."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .._device import constant
from .._mask import ROW_STEP


def chunks(rows: int, size: int, seeds: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The rows of each chunk, and the seeds that draw for its row 0 what ``seeds`` draw for that row of them all."""
    count = -(-rows // max(1, size))
    if count < 2:
        yield slice(0, rows), seeds
        return
    shifted = seeds + _offsets(count, size, seeds.device) if seeds.numel() else [seeds] * count
    for i in range(count):
        yield slice(i * size, (i + 1) * size), shifted[i]


def joined(parts: Sequence[Tensor]) -> Tensor:
    """The chunks' rows one below the other."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


class Sums:
    """The gradients of parameters, which are sums over the chunks: added in their order.

    In 16 bits the chunks' are kept, and added and rounded at once; in 32 they would be as large as what chunks save,
    and lose nothing where each is added to the sum of those before.
    """

    def __init__(self):
        self.parts: list[list[Tensor | None]] = []

    def add(self, parts: Sequence[Tensor | None]) -> None:
        """One chunk's gradients, of which the tensors may be overwritten."""
        if not self.parts or all(part is None or part.itemsize < 4 for part in parts):
            self.parts.append([*parts])
            return
        for total, part in zip(self.parts[0], parts, strict=True):
            if total is not None and part is not None:
                total.add_(part)

    def totals(self) -> list[Tensor | None]:
        """The gradients of all rows."""
        several = len(self.parts) > 1
        return [
            torch.stack([*parts]).sum(0) if several and parts[0] is not None else parts[0]
            for parts in zip(*self.parts, strict=True)
        ]


def _offsets(count: int, size: int, device: torch.device) -> Tensor:
    """``[count, 1]``: a row's key is a function of seed + row · ROW_STEP, in 64 bits that wrap."""
    steps = (chunk * size * ROW_STEP % 2**64 for chunk in range(count))
    return constant(tuple(step - 2**64 if step >> 63 else step for step in steps), torch.int64, device)[:, None]
