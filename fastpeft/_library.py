"""Registers an op once and serves it two ways with one gradient formula.

Eager calls on plain tensors take a short path straight to Python through ``autograd.Function``; compiled calls and
tensor subclasses (FakeTensor, DTensor, ...) take the op registered with ``torch.library``. The registered way costs
about 20 microseconds a call more on a CPU, which 224 LoRA layers would feel.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_LIBRARY = torch.library.Library("fastpeft", "DEF")
_PLAIN = frozenset({Tensor, torch.nn.Parameter})


def register_op(
    name: str,
    schema: str,
    implementation: Callable,
    fake: Callable,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
) -> Callable:
    """Register ``fastpeft::name`` and return the function that calls it the cheaper way.

    Args:
        schema: the part after the name, as in ``"(Tensor x, Tensor[] weights) -> (Tensor[], Tensor)"``.
        implementation: computes the outputs from concrete tensors; must not modify or return an input. Its first
            argument is a tensor or a list of tensors. An op with a gradient returns a list of outputs and one more
            tensor that is kept for backward.
        fake: the outputs' shapes, dtypes and strides.
        setup_context: ``(ctx, inputs, output)``, saves what backward needs; None for an op without a gradient.
        backward: ``(ctx, output_grads, saved_grad)``, one gradient for each input, a list for a list of tensors.
            Lists hold tensors only, never None: torch.library drops the gradients of a list that holds one.
    """
    run = _without_autocast(implementation)
    _LIBRARY.define(name + schema)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastpeft::{name}", fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"fastpeft::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
    registered = getattr(torch.ops.fastpeft, name).default
    function = None if backward is None else _eager_function(run, setup_context, backward)

    def call(*args):
        if torch.compiler.is_compiling():
            return registered(*args)
        tensors, counts = _flatten(args)
        needs_grad = False
        for tensor in tensors:
            if type(tensor) not in _PLAIN:
                return registered(*args)
            needs_grad = needs_grad or tensor.requires_grad
        if function is None or not needs_grad or not torch.is_grad_enabled():
            return run(*args)
        *outputs, saved = function(args, counts, *tensors)
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

    def call(*args):
        plain = not torch.compiler.is_compiling() and all(type(t) in _PLAIN for t in _flatten(args)[0])
        return run(*args) if plain else registered(*args)

    return call


def _eager_function(run: Callable, setup_context: Callable, backward: Callable) -> Callable:
    class Eager(torch.autograd.Function):
        # ``args`` hold the very tensors that autograd sees as ``tensors``.
        @staticmethod
        def forward(ctx, args, counts, *tensors):
            outputs, saved = run(*args)
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(saved)
            setup_context(ctx, args, (outputs, saved))
            ctx.counts = counts
            return (*outputs, saved)

        @staticmethod
        @once_differentiable
        def backward(ctx, *grads):
            flat = [None, None]
            if all(grad is None for grad in grads[:-1]):
                return (*flat, *[None] * sum(ctx.counts))
            for grad, count in zip(backward(ctx, grads[:-1], grads[-1]), ctx.counts, strict=True):
                if count:
                    flat.extend(grad if isinstance(grad, list) else [grad] * count)
            return tuple(flat)

    return Eager.apply


def _flatten(args: Sequence) -> tuple[list[Tensor], list[int]]:
    """All tensors in ``args``, also those in lists, and how many each argument holds."""
    tensors, counts = [], []
    for arg in args:
        before = len(tensors)
        if isinstance(arg, Tensor):
            tensors.append(arg)
        elif isinstance(arg, (list, tuple)) and arg and isinstance(arg[0], Tensor):
            tensors.extend(arg)
        counts.append(len(tensors) - before)
    return tensors, counts


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
