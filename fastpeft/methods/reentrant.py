"""Reentrant gradient checkpoints of transformers' models over frozen inputs.

Such a checkpoint gives its parameters gradients only where an input of it requires one. For text models transformers
makes the embedding's output require one; where it does not (ViT, Whisper, Swin), adapters inside would get none. So the
first input of every checkpointed module that trains something is made to, and the gradient that comes is thrown away.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_FUNCTION = "_gradient_checkpointing_func"


class _Enter(torch.autograd.Function):
    """The same tensor, which requires a gradient; the gradient ends here."""

    @staticmethod
    def forward(ctx, x, ticket):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx):
        return None, None


def opened(args: tuple) -> tuple:
    """The arguments, of which the first tensor of numbers requires a gradient, unless one does already.

    Args:
        args: What a block is called with.
    """
    tensors = [(i, x) for i, x in enumerate(args) if isinstance(x, Tensor) and x.is_floating_point()]
    if not tensors or not torch.is_grad_enabled() or any(x.requires_grad for _, x in tensors):
        return args
    i, x = tensors[0]
    ticket = torch.empty(0, device=x.device, requires_grad=True)
    return (*args[:i], _Enter.apply(x, ticket), *args[i + 1 :])


def is_reentrant(function: Any) -> bool:
    """Whether a checkpoint function says ``use_reentrant=True``, or leaves it to PyTorch, where it may be."""
    return function is not None and getattr(function, "keywords", {}).get("use_reentrant") is not False


class Checkpoint:
    """A module's checkpoint function; older transformers hand it the ``__call__`` of a block inside the module."""

    def __init__(self, function: Callable, module: nn.Module):
        self.function, self.module = function, module
        self.keywords = getattr(function, "keywords", {})  # what tells of the function's kind

    def __call__(self, run: Callable, *args: Any, **kwargs: Any) -> Any:
        inner = getattr(run, "__self__", None)
        module = inner if isinstance(inner, nn.Module) else self.module
        if any(parameter.requires_grad for parameter in module.parameters()):
            args = opened(args)
        return self.function(run, *args, **kwargs)


class _BeforeForward:
    """The hook that finds out, before each forward, which modules are checkpointed by then."""

    def __init__(self, modules: list[nn.Module]):
        self.modules = modules

    def __call__(self, module: nn.Module, args: tuple) -> None:
        if torch.compiler.is_compiling():
            return
        for each in self.modules:
            function = each.__dict__.get(_FUNCTION)
            if function is not None and not isinstance(function, Checkpoint) and is_reentrant(function):
                setattr(each, _FUNCTION, Checkpoint(function, each))


def open_checkpoints(model: nn.Module) -> None:
    """Have reentrant checkpoints in ``model`` give gradients, whenever it is that they are turned on.

    Args:
        model: Any module; one without checkpoints of transformers' is left as it is.
    """
    modules = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    callers = [module for module in model.modules() if hasattr(module, "enable_input_require_grads")]
    for module in dict.fromkeys([model, *callers]) if modules else ():
        module.register_forward_pre_hook(_BeforeForward(modules))


def close_checkpoints(model: nn.Module) -> None:
    """Undo ``open_checkpoints``.

    Args:
        model: As it was given.
    """
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, _BeforeForward):
                del module._forward_pre_hooks[key]
        function = module.__dict__.get(_FUNCTION)
        if isinstance(function, Checkpoint):
            setattr(module, _FUNCTION, function.function)
