"""A function whose calls are recorded once, as programs, and then run without the rest of Python's way."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import key
from .program import Program

_FIRST_RECORDED = 2  # a shape that comes once, as in batches of any length, is not worth a plan
_MOST_PLANS = 4096
_REFUSED = "refused"


class _Backward:
    """How the gradients of a plan are computed: by programs for what has been recorded, else by ``python``.

    Args:
        python: ``(saved, gradients, record) -> (gradients, a Program or None)``.
    """

    def __init__(self, python: Callable):
        self._python = python
        self._seen: dict[tuple, Any] = {}  # how often, or a program

    def run(self, saved: list[Tensor], gradients: list[Tensor | None]) -> Sequence[Tensor | None]:
        # Gradients that are to be differentiated themselves come from the op's definition.
        looks = None if torch.is_grad_enabled() else key.of_tensors([*saved, *gradients])
        if looks is None:
            return self._python(saved, gradients, False)[0]
        if len(self._seen) >= _MOST_PLANS:
            self._seen.clear()
        seen = self._seen.get(looks, 0)
        if isinstance(seen, Program):
            return seen.run([*saved, *(gradient for gradient in gradients if gradient is not None)])
        self._seen[looks] = seen + 1
        found, program = self._python(saved, gradients, seen + 1 == _FIRST_RECORDED)
        if program is not None:
            self._seen[looks] = program
        return found


class Plan(NamedTuple):
    """What stands for a call: its program, which returns the outputs and then what backward needs."""

    program: Program
    outputs: int
    views: Sequence[tuple[int, tuple[int, ...]]]  # arguments that autograd is given in other shapes
    backward: Any  # None where nobody asks for gradients


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Plan, backward: _Backward, *inputs: Tensor) -> tuple:
        ctx.set_materialize_grads(False)
        found = plan.program.run(inputs)
        ctx.save_for_backward(*found[plan.outputs :])
        ctx.run, ctx.inputs = backward.run, len(inputs)
        return tuple(found[: plan.outputs])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple:
        if all(gradient is None for gradient in gradients):
            return (None, None, *[None] * ctx.inputs)
        return (None, None, *ctx.run(list(ctx.saved_tensors), list(gradients)))


class Planned:
    """Calls ``slow`` until a call has been seen before, then has ``record`` make a plan of it, then runs the plan.

    Args:
        slow: the function.
        record: ``(arguments, tensors) -> (outputs, a Plan or None)``.
    """

    def __init__(self, slow: Callable, record: Callable):
        self._slow, self._record = slow, record
        self._seen: dict[tuple, Any] = {}  # how often, that there is no plan, or a plan and its backward

    def __call__(self, *arguments: Any) -> Any:
        tensors: list[Tensor] = []
        looks = key.of_call(arguments, tensors)
        if looks is None:
            return self._slow(*arguments)
        seen = self._seen.get(looks)
        if type(seen) is not tuple:
            return self._slow(*arguments) if seen is _REFUSED else self._first(looks, seen or 0, arguments, tensors)
        plan, backward = seen
        if backward is None:
            return plan.program.run(tensors)
        for i, sizes in plan.views:
            tensors[i] = tensors[i].view(sizes)
        return list(_Node.apply(plan, backward, *tensors))

    def clear(self) -> None:
        """Forget everything."""
        self._seen.clear()

    @property
    def plans(self) -> int:
        """How many there are."""
        return sum(type(seen) is tuple for seen in self._seen.values())

    def _first(self, looks: tuple, times: int, arguments: tuple, tensors: list[Tensor]) -> Any:
        if times + 1 < _FIRST_RECORDED:
            if len(self._seen) >= _MOST_PLANS:
                self._seen.clear()
            self._seen[looks] = times + 1
            return self._slow(*arguments)
        self._seen[looks] = _REFUSED  # until it is recorded, which may call this again
        outputs, plan = self._record(arguments, tensors)
        if plan is not None:
            self._seen[looks] = plan, None if plan.backward is None else _Backward(plan.backward)
        return outputs
