"""Layers of a bank that usually receive one tensor, whose adapters are then computed in one call."""

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ... import ops
from .batch import Batch


class Siblings:
    """Layers that usually receive one tensor (q, k and v; gate and up): the first that is called computes all.

    The others hand out what it left if they are called with the very same, unchanged tensor, in the same call of the
    module that holds them, which two hooks delimit: between two calls anybody may write where no version shows it. A
    group whose results were not asked for, twice in a row, is no group, and stays apart from then on.
    """

    # The members are ``sites.Site``, which knows its group.
    def __init__(self, caller: nn.Module, members: Sequence[Any]):
        self.members = list(members)
        self._apart = False
        self._unclaimed = 0  # calls in a row that left results
        self._thread = threading.local()
        self._hooks = [
            caller.register_forward_pre_hook(self._begin),
            caller.register_forward_hook(self._end, always_call=True),
        ]

    def __getstate__(self):
        return {"members": []}

    def __setstate__(self, state):  # in a copy of the model, which has no bank
        self.__dict__.update(state, _apart=True, _unclaimed=0, _thread=threading.local(), _hooks=[])

    def detach(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()

    def _begin(self, *_: object) -> None:
        if not torch.compiler.is_compiling():
            self._thread.left = None
            self._thread.called = True

    def _end(self, *_: object) -> None:
        if not torch.compiler.is_compiling():
            if self._thread.__dict__.pop("left", None) is not None:
                self._unclaimed += 1
                self._apart = self._apart or self._unclaimed > 1
            self._thread.called = False

    def shares(self, x: Tensor) -> bool:
        """Whether this call may be shared. Without a version, as in inference mode, x cannot be known as unchanged."""
        if self._apart or torch.compiler.is_compiling() or x.is_inference():
            return False
        return getattr(self._thread, "called", False)

    def forward(self, site: Any, x: Tensor, batch: Batch) -> Tensor:
        left, self._thread.left = self._thread.left, None
        if left is not None:
            same, version, outputs = left
            if same is x and version == x._version and site in outputs:
                y = outputs.pop(site)
                if outputs:
                    self._thread.left = left
                else:
                    self._unclaimed = 0
                return y
            self._apart = True
        members, *tables = self._plan(batch)
        # A layer that was called leaves its output complete: the model may go on with it before it calls the next.
        outputs = {member: member.called(batch, x) for member in (members if not self._apart else ())}
        if site not in outputs:
            return site._forward(x)
        ops.multi_lora_(list(outputs.values()), x, tables[0], tables[1], batch.routing(x.shape[:-1]), *tables[2:])
        y = outputs.pop(site)
        if outputs:
            self._thread.left = x, x._version, outputs
        return y

    def _plan(self, batch: Batch) -> tuple:
        """The members that have something for this batch, and their tables as multi_lora_ takes them."""
        plan = batch.plans.get(self)
        if plan is None:
            members = [member for member in self.members if not member._idle(batch)]
            scales, ranks = (torch.stack([getattr(m, name) for m in members]) for name in ("scales", "ranks"))
            tables = [m.tables() for m in members]
            columns = [lora_a for lora_a, *_ in tables], [lora_b for _, lora_b, *_ in tables]
            plan = batch.plans[self] = (members, *columns, scales, ranks)
        return plan


def writable(y: Tensor) -> Tensor:
    """What a layer gave, so that adapters can be added to it in place."""
    return y if y.dim() <= 2 or y.is_contiguous() else y.contiguous()
