"""The rows of a running batch and their adapters: what every adapted layer asks for while the batch runs."""

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import ops
from ...ops.routing import Routing

_KEPT = 8  # routings of recent shapes; a decode step needs two, a prompt that grows without a cache one a step


class Batch:
    """Rows side by side: row i's tokens use slot ``slots[i]``, or none where it is -1.

    Args:
        op: what the user called, for errors.
        slots: of each row, -1 for a row without an adapter.
        lengths: None for tensors ``[rows, ...]``, every row with as many tokens as the next; else the number of tokens
            of each row, in tensors that hold the rows one after the other, as in ``[1, T, K]``.
        picked: with lengths, the places of the tokens that alone reach the head, if some do.
        slot_count: slots of the bank.
        device: of the model.
    """

    def __init__(
        self,
        op: str,
        slots: Sequence[int],
        lengths: Sequence[int] | None,
        picked: Sequence[int] | None,
        slot_count: int,
        device: torch.device,
    ):
        self.op, self.rows = op, len(slots)
        self.every = False  # whether layers take part that no adapter of the batch touches
        self.mask = 0  # bit s: a row uses slot s
        for slot in slots:
            self.mask |= 1 << slot if slot >= 0 else 0
        self.total = None if lengths is None else sum(lengths)
        # What each group of siblings computes.
        self.plans: dict[Any, tuple[Any, ...]] = {}
        self.slot_count = slot_count
        self._routings: dict[torch.Size, Routing] = {}
        self._slots = torch.tensor(slots, dtype=torch.int32, device=device)
        if lengths is not None:
            counts = torch.tensor(lengths, device=device)
            self._slots = torch.repeat_interleave(self._slots, counts, output_size=self.total)
        self._picked = None if picked is None else torch.tensor(picked, device=device)

    @classmethod
    def of_slots(cls, op: str, slots: Tensor, slot_count: int) -> "Batch":
        """A batch of one token a row, whose slots are what the tensor comes to hold; every layer takes part.

        Args:
            op: what the user called, for errors.
            slots: ``[T]``, int32.
            slot_count: slots of the bank.
        """
        batch = cls.__new__(cls)  # which makes no tensor: a capture would not let it
        batch.op, batch.rows, batch.total, batch.mask = op, len(slots), len(slots), -1
        batch.every, batch.plans, batch.slot_count, batch._routings = True, {}, slot_count, {}
        batch._slots, batch._picked = slots, None
        return batch

    def routing(self, shape: torch.Size) -> Routing:
        """Of the tokens of a tensor with these leading dimensions; made once for all layers and steps."""
        found = self._routings.get(shape)
        if found is None:
            if len(self._routings) >= _KEPT:
                self._routings.clear()
            found = self._routings[shape] = ops.route(self.token_slots(shape), self.slot_count)
        return found

    def token_slots(self, shape: torch.Size) -> Tensor:
        """int32, one slot for each token of a tensor with these leading dimensions.

        Raises:
            ValueError: the tensor's tokens cannot be told apart by row.
        """
        tokens = shape.numel()
        if self.total is not None:
            if self._picked is not None and tokens == len(self._picked) != self.total:
                return self._slots[self._picked]
            if tokens != self.total:
                raise ValueError(
                    f"{self.op}: a layer received {tokens} tokens {list(shape)}, expected the {self.total} of lengths"
                )
            return self._slots
        if not shape or shape[0] % self.rows:
            given = f"a tensor of {list(shape)} tokens, whose first dimension is no multiple of the rows"
            raise ValueError(f"{self.op}: adapter_names has {self.rows} rows, but a layer received {given}")
        # Beams and returned sequences repeat each row in place; a flattened [rows * L] holds each row's tokens in turn.
        return self._slots.repeat_interleave(tokens // self.rows)


class Running(threading.local):
    """The batch that the current thread runs, or None."""

    batch: Batch | None = None
