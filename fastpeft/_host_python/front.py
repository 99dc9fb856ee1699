"""The whole of a layer's call where nothing but x is new: see ``fastpeft/nn/front.py``."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import key
from .guards import Guards
from .planned import Planned

_hooks, _graph_task = torch._C._autograd._top_saved_tensors_default_hooks, torch._C._current_graph_task_id


class Bound:
    """A planned function with all of its arguments but one tensor.

    Args:
        planned: the function; arguments: all of them; place: the number of the one that is given later.
        cast: those that autocast casts; kept: those that it leaves as they are in float32.
    """

    def __init__(self, planned: Planned, arguments: tuple, place: int, cast: Sequence[Tensor], kept: Sequence[Tensor]):
        self._planned, self._before, self._behind = planned, arguments[:place], arguments[place + 1 :]
        self._cast, self._kept = cast, kept

    def __call__(self, x: Tensor) -> Sequence[Tensor] | None:
        """The outputs for x, or None where autocast has something to cast first."""
        if type(x) not in key.PLAIN:
            return None
        wanted = key.cast_to(x)
        if wanted is not None and x.dtype != torch.float64 and self._casts(x, wanted):
            return None
        return self._planned(*self._before, x, *self._behind)

    def _casts(self, x: Tensor, wanted: torch.dtype) -> bool:
        return any(tensor.dtype != wanted for tensor in (x, *self._cast)) or any(
            tensor.dtype not in (wanted, torch.float32) for tensor in self._kept
        )


class Front:
    """What a layer calls with itself and x; None where its own forward has to compute.

    Args:
        layer: the layer; guards: what holds as long as it computes this; branch: what it computes.
        bound: the op for this branch alone.
        group: the ``SharedInput`` that it is in, or None; me: its number there; part: of those that share.
    """

    def __init__(
        self, layer: Any, guards: Guards, branch: Any, bound: Callable, group: Any, me: int | None, part: int | None
    ):
        self._layer, self._guards, self._branch, self._bound = layer, guards, branch, bound
        self._group, self._me, self._part = group, me, part

    def __call__(self, layer: Any, x: Tensor | None) -> Tensor | None:
        # A replica copies the dictionary that this is in.
        if layer is not self._layer or x is None or not self._guards(x):
            return None
        return self._alone(x) if self._group is None else self._shared(x)

    def _alone(self, x: Tensor) -> Tensor | None:
        found = self._bound(x)
        return None if found is None else found[0]

    def _shared(self, x: Tensor) -> Tensor | None:
        """As ``SharedInput.forward`` does it where nothing is recomputed."""
        group, me, part = self._group, self._me, self._part
        rounds = group._thread.__dict__.get("rounds")
        if rounds is None or x.is_inference() or _graph_task() != -1 or _hooks(True) is not None:
            return None
        now = _conditions(x)
        last = rounds.get(part)
        if last is None:
            plan = group._plans.get(me)
            if plan is None or not self._follows(plan) or plan.parts is not group._parts or not plan.guards(x):
                return None
            # Without gradients this may be what reentrant checkpointing computes again, which must draw the same masks.
            if plan.drops and not torch.is_grad_enabled():
                return self._alone(x)
            return group._lead(me, x, plan, now, rounds)
        if last.x is not x or last.conditions != now or not self._follows(last.plan):
            return None
        if me not in last.outputs or last.versions != last.plan.guards.versions():
            return None
        output = last.outputs.pop(me)
        if not last.outputs:
            del rounds[part]
            group._unclaimed = 0
        return output

    def _follows(self, plan: Any) -> bool:
        """Whether a plan of the siblings has this layer as it is now, and guards."""
        found = plan.branches.get(self._me)
        return (
            plan.guards is not None
            and found is not None
            and (found is self._branch or all(a is b for a, b in zip(found, self._branch, strict=True)))
        )


def _conditions(x: Tensor) -> tuple:
    """As ``call_conditions`` of ``fastpeft/nn/conditions.py`` has them, without hooks."""
    return x._version, torch.is_grad_enabled(), key.cast_to(x) or False, None
