"""Plans: calls that repeat take one call into the extension of ``_host.py`` instead of their whole way through Python.

What a call does is decided by what ``csrc/host/key.cpp`` looks at: shapes, strides, dtypes, devices and alignment of
its tensors, who asks for gradients, its numbers, grad and autocast mode, ``FASTPEFT_BACKEND``. The second call that
looks alike is recorded (``_tape.py``) on its way; those after it run the recorded steps as the only node of autograd,
in C++ or, where the extension is not built, in the Python of ``_host_python``. Whatever does not look plain
(subclasses, modes, transforms, tracing, forward-mode gradients) takes the whole way.
"""

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from . import _host
from ._tape import Refused, Tape, recording, unrecorded

__all__ = ["bound", "node", "planned", "refusals", "unrecorded"]

refusals: Counter[str] = Counter()  # why calls that were seen twice have no plan


def planned(function: Callable) -> Callable:
    """``function`` with plans for the calls that repeat.

    Args:
        function: takes tensors, numbers, strings, None, and lists and tuples of those, by position; returns a list of
            tensors that are no arguments. What it does may depend on nothing but what the key holds.
    """
    found = _host.serving()
    if found is None:
        return function

    @functools.wraps(function)
    def call(*args):
        if torch.compiler.is_compiling() or recording() is not None:
            return function(*args)
        return call.plans(*args)  # type: ignore[attr-defined]

    call.plans = table(function, found)  # type: ignore[attr-defined]
    return call


def table(function: Callable, host: Any) -> Any:
    """``host.Planned`` of a function: what calls it until there are plans, and then runs those."""
    return host.Planned(function, functools.partial(_record, host, function))


def bound(call: Any, arguments: tuple, place: int, cast: Sequence, kept: Sequence) -> Any:
    """A function of one tensor that gives what ``call`` does, without the op's Python; None where nothing serves.

    It gives None where autocast has something to cast first.

    Args:
        call: what ``planned`` gave; arguments: its arguments, of which that at ``place`` is the tensor.
        cast: those of the arguments that autocast casts; kept: those that it leaves as they are in float32.
    """
    host = _host.serving()
    if host is None:
        return None
    given = [tuple(item for item in items if isinstance(item, Tensor)) for items in (cast, kept)]
    return host.Bound(call.plans, arguments, place, *given)


def node(ctx: Any, tensors: Sequence[Tensor], outputs: Sequence[Tensor], backward: Callable) -> None:
    """To be called by an ``autograd.Function`` once it has saved what it needs: a tape notes it.

    Args:
        ctx: the function's context. What it holds beside tensors is the same for all calls that look alike.
        tensors: those that get gradients; outputs: those that gradients come for.
        backward: of the function: ``(ctx, *gradients, None)``, a gradient for each tensor behind one that is None.
    """
    tape = recording()
    if tape is None:
        return
    if tape.node is not None:
        tape.refuse("more than one node of autograd")
    tape.node = ctx, list(ctx.to_save or ()), list(tensors), list(outputs), backward


def _record(found: ModuleType, function: Callable, args: tuple, tensors: list[Tensor]) -> tuple[list, Any]:
    """The outputs of a call, and a plan for those that look like it, or None."""
    with Tape(tensors) as tape:
        outputs = function(*args)
    asks = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    try:
        if tape.refused is not None:
            raise Refused(tape.refused)
        if asks and tape.node is None:
            raise Refused("autograd knows of no node")
        saved, views, backward = _backward(found, tape, outputs) if asks else ([], {}, None)
        if any(tape.place(output).slot[0] != "created" for output in outputs):
            raise Refused("an output is an argument")
        program = tape.program(found, [*outputs, *saved], tensors[0].device, views)
    except Refused as error:
        refusals[str(error)] += 1
        return outputs, None
    return outputs, found.Plan(program, len(outputs), list(views.items()), backward)


def _backward(
    found: ModuleType, tape: Tape, outputs: Sequence[Tensor]
) -> tuple[list[Tensor], dict[int, tuple[int, ...]], Callable]:
    """What a plan has to keep, which arguments it is given in which other shape, and how it computes gradients.

    What is kept is what Python's way keeps, tensor by tensor, in the same shapes: a checkpoint may compute by one way
    and again by the other.
    """
    ctx, to_save, tensors, inner, backward = tape.node
    inputs = tape.inputs
    owners = [_owner(tape, tensor) for tensor in tensors]
    counts = Counter(owners)
    if any(tensor.requires_grad and counts[owner] > 1 for owner, tensor in zip(owners, tensors, strict=True)):
        raise Refused("an argument that gets a gradient was given twice")
    matches = [next((i for i, o in enumerate(outputs) if _same(o, t)), None) for t in inner]
    places = [match for match in matches if match is not None]
    numbers = [i for i, output in enumerate(outputs) if output.is_floating_point()]  # seeds have no gradient
    if len(places) != len(inner) or set(places) != set(numbers):
        raise Refused("an output is not the node's")
    kept: list[Tensor] = []
    views: dict[int, tuple[int, ...]] = {}
    for tensor in to_save:
        owner = None if tensor is None else _owner(tape, tensor)
        if owner is not None:
            if views.setdefault(owner, tuple(tensor.shape)) != tuple(tensor.shape):
                raise Refused("an argument is kept in two shapes")
            tensor = inputs[owner]  # as it was given, which autograd can follow further
        if tensor is not None:
            kept.append(tensor)
    views = {owner: shape for owner, shape in views.items() if shape != tuple(inputs[owner].shape)}
    present = [tensor is not None for tensor in to_save]
    facts, shapes = vars(ctx) | {"counts": ctx.counts}, [tuple(tensor.shape) for tensor in inner]
    wanted = [views.get(i, tuple(tensor.shape)) for i, tensor in enumerate(inputs)]

    def run(saved: list[Tensor], gradients: list[Tensor | None], record: bool) -> tuple[list, Any]:
        record = record and recording() is None
        tape = Tape([*saved, *(g for g in gradients if g is not None)]) if record else None
        with tape or nullcontext():
            rest = iter(saved)
            own = [next(rest) if there else None for there in present]
            given = [None if (g := gradients[m]) is None else g.reshape(s) for m, s in zip(places, shapes, strict=True)]
            _, *computed = backward(SimpleNamespace(saved_tensors=own, **facts), *given, None)
            result: list[Tensor | None] = [None] * len(wanted)
            for owner, gradient in zip(owners, computed, strict=True):
                if owner is not None and gradient is not None:
                    result[owner] = gradient.reshape(wanted[owner])
        if tape is None:
            return result, None
        try:
            return result, tape.program(found, result, saved[0].device)
        except Refused as error:
            refusals[f"backward: {error}"] += 1
            return result, None

    return kept, views, run


def _owner(tape: Tape, tensor: Tensor) -> int | None:
    """Which argument this is, perhaps in another shape; None for none of them."""
    kind, number = tape.place(tensor).slot
    if kind != "input":
        if tensor.requires_grad:
            raise Refused("a gradient for a copy of an argument")
        return None
    argument = tape.inputs[number].detach()
    if argument.dtype != tensor.dtype:
        raise Refused("a gradient for an argument in another dtype")
    if argument.shape != tensor.shape and (
        argument.numel() != tensor.numel() or not _same(argument.reshape(tensor.shape), tensor)
    ):
        raise Refused("a gradient for a part of an argument")
    if argument.shape == tensor.shape and argument.stride() != tensor.stride():
        raise Refused("a gradient for an argument in another order")
    return number


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether these are the same elements in the same order, perhaps in different shapes."""
    if one.data_ptr() != other.data_ptr() or one.numel() != other.numel():
        return False
    alike = one.shape == other.shape and one.stride() == other.stride()
    return alike or (one.is_contiguous() and other.is_contiguous())
