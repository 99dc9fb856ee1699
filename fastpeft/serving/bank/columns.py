"""What an adapter has for each output of a layer beside A and B: the gain of DoRA, a bias of B."""

import torch
from torch import Tensor

from .batch import Batch


class Columns:
    """One of them for all slots: float32 ``[slots + 1, N]``, 0 in the last row, which is for no slot.

    Attributes:
        values: the table, or None before an adapter needs it.
    """

    def __init__(self):
        self.values: Tensor | None = None
        self._mask = 0  # bit s: slot s is not 0

    def make(self, slots: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        """Allocate the table, unless it is there."""
        if self.values is None:
            self.values = torch.zeros(slots + 1, width, dtype=torch.promote_types(dtype, torch.float32), device=device)

    def write(self, slot: int, row: Tensor | None) -> None:
        """Copy an adapter's row into a slot; None: it has none, and who was there before goes."""
        bit = 1 << slot
        if row is not None and self.values is not None:
            self._mask |= bit
            self.values[slot].copy_(row, non_blocking=True)
        elif self._mask & bit and self.values is not None:
            self._mask &= ~bit
            self.values[slot].zero_()

    def of(self, batch: Batch, y: Tensor) -> Tensor | None:
        """For each token of a layer's output its row; None where nobody in the batch has one."""
        everybody = batch.every or torch.compiler.is_compiling()
        if self.values is None or not (everybody or self._mask & batch.mask):
            return None
        return self.values[batch.token_slots(y.shape[:-1]).long()].view(y.shape)  # -1 is the last row


def taken(tensors: dict[str, Tensor], end: str) -> dict[str, Tensor]:
    """Those of a checkpoint's tensors whose keys end so, by what is before that; they are removed."""
    return {key.removesuffix(end): tensors.pop(key) for key in list(tensors) if key.endswith(end)}
