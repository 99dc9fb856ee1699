"""A function whose calls are recorded once, as programs, and then run without the rest of Python's way."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import key
from .likeness import recogniser
from .program import Program

_FIRST_RECORDED = 2  # a shape that comes once, as in batches of any length, is not worth a plan
_MOST_PLANS = 4096
_MOST_ALIKE = 512
_REFUSED = "refused"


class _Known:
    """Kinds of calls that came before, with what recognises each, so that no key is made for them."""

    def __init__(self) -> None:
        self._kinds: list[tuple[Callable, Any]] = []  # in the order in which they came, as they will come again
        self._at = -1  # the last that was found

    def find(self, arguments: Sequence) -> tuple[list[Tensor], Any] | None:
        """The tensors of a call that is known, and what stands for it."""
        kinds, at = self._kinds, self._at
        for _ in kinds:
            at = at + 1 if at + 1 < len(kinds) else 0
            tensors_of, found = kinds[at]
            tensors = tensors_of(arguments)
            if tensors is not None:
                self._at = at
                return tensors, found
        return None

    def add(self, arguments: Sequence, found: Any) -> None:
        """From now on calls that look like this one are known."""
        tensors_of = recogniser(arguments)
        if tensors_of(arguments) is not None:
            kinds = self._kinds if len(self._kinds) < _MOST_ALIKE else []
            self._kinds = [*kinds, (tensors_of, found)]


class _Backward:
    """How the gradients of a plan are computed: by programs for what has been recorded, else by ``python``.

    Args:
        python: ``(saved, gradients, record) -> (gradients, a Program or None)``.
    """

    def __init__(self, python: Callable):
        self._python = python
        self._seen: dict[tuple, Any] = {}  # how often, or a program
        self._known = _Known()

    def run(self, saved: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        # Gradients that are to be differentiated themselves come from the op's definition.
        if torch.is_grad_enabled() or not key.thread_is_plain():
            return self._python(list(saved), list(gradients), False)[0]
        given = [*saved, *gradients]
        found = self._known.find(given)
        if found is not None:
            return found[1].run(found[0])
        return self._unknown(given, list(saved), list(gradients))

    def _unknown(self, given: list, saved: list, gradients: list) -> Sequence[Tensor | None]:
        looks = key.of_tensors(given)
        if looks is None:
            return self._python(saved, gradients, False)[0]
        if len(self._seen) >= _MOST_PLANS:
            self._seen.clear()
        seen = self._seen.get(looks, 0)
        if isinstance(seen, Program):
            self._known.add(given, seen)
            return seen.run([tensor for tensor in given if tensor is not None])
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
        ctx.run, ctx.nothing = backward.run, (None,) * (2 + len(inputs))
        return tuple(found[: plan.outputs])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple:
        if all(gradient is None for gradient in gradients):
            return ctx.nothing
        return (None, None, *ctx.run(ctx.saved_tensors, gradients))


_apply = super(torch.autograd.Function, _Node).apply  # past what transforms need, under which nothing is planned


class Planned:
    """Calls ``slow`` until a call has been seen before, then has ``record`` make a plan of it, then runs the plan.

    Args:
        slow: the function.
        record: ``(arguments, tensors) -> (outputs, a Plan or None)``.
    """

    def __init__(self, slow: Callable, record: Callable):
        self._slow, self._record = slow, record
        self._seen: dict[tuple, Any] = {}  # how often, that there is no plan, or a plan and its backward
        self._known: dict[tuple, _Known] = {}  # by the modes and the first tensor's shape

    def __call__(self, *arguments: Any) -> Any:
        modes = key.modes()
        if modes is None:
            return self._slow(*arguments)
        for first in arguments:
            if type(first) in key.PLAIN:
                modes = modes, first.shape
                break
        known = self._known.get(modes)
        found = None if known is None else known.find(arguments)
        return self._unknown(modes, arguments) if found is None else self._run(found[1], arguments, found[0])

    def clear(self) -> None:
        """Forget everything."""
        self._seen.clear()
        self._known.clear()

    @property
    def plans(self) -> int:
        """How many there are."""
        return sum(type(seen) is tuple for seen in self._seen.values())

    def _run(self, seen: Any, arguments: tuple, tensors: list[Tensor]) -> Any:
        if seen is _REFUSED:
            return self._slow(*arguments)
        plan, backward = seen
        if backward is None:
            return plan.program.run(tensors)
        for i, sizes in plan.views:
            tensors[i] = tensors[i].view(sizes)
        return list(_apply(plan, backward, *tensors))

    def _unknown(self, modes: tuple, arguments: tuple) -> Any:
        tensors: list[Tensor] = []
        looks = key.of_call(arguments, tensors)
        if looks is None:
            return self._slow(*arguments)
        seen = self._seen.get(looks, 0)
        if type(seen) is int:
            return self._first(looks, seen, arguments, tensors)
        self._known.setdefault(modes, _Known()).add(arguments, seen)
        return self._run(seen, arguments, tensors)

    def _first(self, looks: tuple, times: int, arguments: tuple, tensors: list[Tensor]) -> Any:
        if times + 1 < _FIRST_RECORDED:
            if len(self._seen) >= _MOST_PLANS:
                self.clear()
            self._seen[looks] = times + 1
            return self._slow(*arguments)
        self._seen[looks] = _REFUSED  # until it is recorded, which may call this again
        outputs, plan = self._record(arguments, tensors)
        if plan is not None:
            self._seen[looks] = plan, None if plan.backward is None else _Backward(plan.backward)
        return outputs
