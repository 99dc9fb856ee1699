"""Registers an op once and serves it two ways with one gradient formula.

Eager calls on plain tensors take a short path straight to Python through ``autograd.Function``; compiled calls and
tensor subclasses (FakeTensor, DTensor, ...) take the op registered with ``torch.library``. The registered way costs
about 20 microseconds a call more on a CPU, which 224 LoRA layers would feel.

Gradients that are to be differentiated themselves (``create_graph=True``) are not the kernels': autograd takes them
from the op's definition, as often as it likes.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _plan
from ._check import PLAIN

_LIBRARY = torch.library.Library("fastpeft", "DEF")


def register_op(
    name: str,
    schema: str,
    implementation: Callable,
    fake: Callable,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
    definition: Callable | None = None,
) -> Callable:
    """Register ``fastpeft::name`` and return the function that calls it the cheaper way.

    Args:
        schema: the part after the name, as in ``"(Tensor x, Tensor[] weights) -> (Tensor[], Tensor)"``.
        implementation: computes the outputs from concrete tensors; must not modify or return an input. Its first
            argument is a tensor or a list of tensors. An op with a gradient returns a list of outputs, and what is kept
            for backward: one more tensor, or a list of them.
        fake: the outputs' shapes, dtypes and strides.
        setup_context: ``(ctx, inputs, output)``, saves what backward needs; None for an op without a gradient.
        backward: ``(ctx, output_grads, saved_grad)``, one gradient for each input, a list for a list of tensors.
            Lists hold tensors only, never None: torch.library drops the gradients of a list that holds one.
        definition: ``(ctx, output_grads)``, from what was saved: the inputs that get gradients, as ``backward`` orders
            those, and a differentiable function of them that gives the outputs. Whatever no gradient depends on may be
            0 there. None: no gradient depends on any input, so that there is nothing to differentiate.
    """
    run = _without_autocast(implementation)
    if backward is not None and definition is not None:
        backward = _differentiable(backward, definition)
    _LIBRARY.define(name + schema)
    _LIBRARY.impl(name, _unaliased(run), "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastpeft::{name}", fake, lib=_LIBRARY)
    if backward is not None and setup_context is not None:
        torch.library.register_autograd(f"fastpeft::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
    registered = getattr(torch.ops.fastpeft, name).default
    places = _tensor_places(registered)
    function = None
    if backward is not None and setup_context is not None:
        function = _eager_function(run, setup_context, backward, places, once=definition is None)

    def call(*args):
        tensors = None if torch.compiler.is_compiling() else _plain_tensors(args, places)
        if tensors is None:
            return registered(*args)
        if function is None or not torch.is_grad_enabled() or not any(t.requires_grad for t in tensors):
            return run(*args)
        *outputs, saved = function(args, *tensors)
        return outputs, saved

    return call


def register_inplace_op(name: str, schema: str, implementation: Callable) -> Callable:
    """Register ``fastpeft::name``, which writes into its first argument, a list of tensors, and returns nothing.

    It has no gradient: whoever calls it has checked that none is asked for.
    """
    run = _without_autocast(implementation)
    _LIBRARY.define(name + schema)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastpeft::{name}", lambda *_: None, lib=_LIBRARY)
    registered = getattr(torch.ops.fastpeft, name).default
    places = _tensor_places(registered)

    def call(*args):
        plain = not torch.compiler.is_compiling() and _plain_tensors(args, places) is not None
        return run(*args) if plain else registered(*args)

    return call


def _eager_function(
    run: Callable, setup_context: Callable, backward: Callable, places: Sequence[int], once: bool
) -> Callable:
    class Eager(torch.autograd.Function):
        # ``args`` hold the very tensors that autograd sees as ``tensors``.
        @staticmethod
        def forward(ctx, args, *tensors):
            outputs, saved = run(*args)
            ctx.set_materialize_grads(False)
            setup_context(ctx, args, (outputs, saved))
            ctx.counts = [_count(args[place]) for place in places]
            _plan.node(ctx, tensors, outputs, Eager.backward)
            if isinstance(saved, list):  # nobody is given them
                saved = saved[0]
            ctx.mark_non_differentiable(saved)
            return (*outputs, saved)

        @staticmethod
        def backward(ctx, *grads):
            if all(grad is None for grad in grads[:-1]):
                return (None, *[None] * sum(ctx.counts))
            found, flat = backward(ctx, grads[:-1], grads[-1]), [None]
            for place, count in zip(places, ctx.counts, strict=True):
                if count:
                    grad = found[place]
                    flat.extend(grad if isinstance(grad, list) else [grad] * count)
            return tuple(flat)

    if once:
        Eager.backward = staticmethod(once_differentiable(Eager.backward))  # type: ignore[method-assign]
    return Eager.apply


def _differentiable(backward: Callable, definition: Callable) -> Callable:
    """``backward`` where gradients are all that is asked for, else autograd's of the definition."""

    def run(ctx, grads, saved_grad):
        if not torch.is_grad_enabled():
            return backward(ctx, grads, saved_grad)
        inputs, function = definition(ctx, grads)
        # Aliases: the gradient of an input is the op's alone, also where one input was computed from another.
        groups = [[None if t is None else t.view_as(t) for t in _as_list(group)] for group in inputs]
        asked = [t for group in groups for t in group if t is not None and t.requires_grad]
        with torch.autocast(asked[0].device.type, enabled=False):
            ys = function(*(g if isinstance(group, list) else g[0] for g, group in zip(groups, inputs, strict=True)))
            pairs = [(y, dy) for y, dy in zip(ys, grads, strict=True) if dy is not None and y.requires_grad]
            ys, dys = zip(*pairs, strict=True)
            given = torch.autograd.grad(ys, asked, dys, create_graph=True, materialize_grads=True)
        found = iter(given)
        gradients = [[next(found) if t is not None and t.requires_grad else None for t in group] for group in groups]
        filled = [_filled(group, own) for group, own in zip(gradients, groups, strict=True)]
        return tuple(g if isinstance(group, list) else g[0] for g, group in zip(filled, inputs, strict=True))

    return run


def _filled(gradients: list, tensors: list) -> list:
    """A list without any gradient stays so; among gradients there is a tensor for each."""
    if all(gradient is None for gradient in gradients):
        return gradients
    return [t.new_zeros(t.shape) if g is None else g for g, t in zip(gradients, tensors, strict=True)]


def _as_list(group: Tensor | list | None) -> list:
    return group if isinstance(group, list) else [group]


def _tensor_places(registered: torch._ops.OpOverload) -> tuple[int, ...]:
    """Which arguments of the op are tensors, optional tensors or lists of tensors."""
    return tuple(i for i, a in enumerate(registered._schema.arguments) if "Tensor" in str(a.type))


def _plain_tensors(args: Sequence, places: Sequence[int]) -> list[Tensor] | None:
    """All tensors in ``args``, also those in lists; None where one is of a subclass."""
    tensors = []
    for place in places:
        arg = args[place]
        if type(arg) in PLAIN:
            tensors.append(arg)
        elif isinstance(arg, (list, tuple)):
            tensors.extend(arg)
            if not all(type(t) in PLAIN for t in arg):
                return None
        elif arg is not None:
            return None
    return tensors


def _count(arg: Tensor | Sequence[Tensor] | None) -> int:
    return 1 if isinstance(arg, Tensor) else 0 if arg is None else len(arg)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast casts a call on x to, or None: it is off, x is float64, or on the meta device, which has none."""
    device_type = x.device.type
    if device_type == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def cast(value, dtype: torch.dtype, kept: torch.dtype | None = None):
    """A tensor in ``dtype``, except one of the dtype ``kept``; anything else as it is, for a check to refuse."""
    return value.to(dtype) if isinstance(value, Tensor) and value.dtype != kept else value


def _unaliased(run: Callable) -> Callable:
    """torch.library allows no two outputs in one storage; eager calls may hand out parts of one."""

    def registered(*args):
        found, seen = run(*args), set()
        outputs = found if isinstance(found, list) else found[0]
        for i, output in enumerate(outputs):
            storage = output.untyped_storage()._cdata
            outputs[i] = output.clone() if storage in seen else output
            seen.add(storage)
        return found

    return registered


def _without_autocast(implementation: Callable) -> Callable:
    # The public functions have applied autocast's casts already; inside, every dtype is meant as it is.
    def run(*args):
        first = args[0] if isinstance(args[0], Tensor) else args[0][0]
        device_type = first.device.type
        if device_type == "meta" or not torch.is_autocast_enabled(device_type):
            return implementation(*args)
        with torch.autocast(device_type, enabled=False):
            return implementation(*args)

    return run
