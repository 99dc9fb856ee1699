"""Which adapters of an attached model act: active, disabled, merged into the frozen weights."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from torch import nn

from .attachment import Attachment, holder_of
from .registry import method_of, methods_of


def set_adapter(model: nn.Module, names: str | Sequence[str], trainable: bool = True) -> None:
    """Make these adapters active and trainable (unless told otherwise), the others inactive and frozen.

    The terms of several active LoRA adapters add up; bottleneck adapters follow one another. Of a module in
    modules_to_save, and of the methods that act once (prompts, selective), only one active adapter may have a part.
    """
    holder, state = holder_of("set_adapter", model)
    names = (names,) if isinstance(names, str) else tuple(dict.fromkeys(names))
    for name in names:
        if name not in state.configs:
            raise ValueError(f"set_adapter: no adapter {name!r}, expected one of {', '.join(state.configs)}")
    refuse_merged("set_adapter", holder, state)
    for method in methods_of(state):
        method.check_active("set_adapter", holder, names)
    for method in methods_of(state):
        method.set_active(holder, names, trainable)
    state.active = names


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[nn.Module]:
    """Inside the ``with`` block the model computes what it did before it was attached to, trained biases included."""
    holder, state = holder_of("disable_adapter", model)
    with ExitStack() as stack:
        for method in methods_of(state):
            stack.callback(method.disable(holder))
        yield model


def merge(model: nn.Module) -> None:
    """Add the active adapters to the frozen weights, so that the model runs at the speed of the base model.

    ``W + scale · B A`` is computed in float32 or wider and rounded once. The original weights are kept beside the
    merged ones, since subtracting would lose bits; ``detach(model, keep_merged=True)`` lets them go.

    Raises:
        ValueError: an active adapter is no term of a weight (bottleneck, prompt), or a layer cannot be merged (not
            finite, a bias without a place, a weight tied to another module); nothing has been changed then.
    """
    holder, state = holder_of("merge", model)
    refuse_merged("merge", holder, state)
    for name in state.active:
        for config in state.parts(name):
            method = method_of("merge", config)
            if method.unmergeable is not None:
                raise ValueError(f"merge: adapter {name!r} is {method.title}, which cannot be: {method.unmergeable}")
    ready = [run for run in (method.prepare_merge(holder) for method in methods_of(state)) if run is not None]
    if not ready:
        raise ValueError("merge: no adapter is active")
    for run in ready:
        run()


def unmerge(model: nn.Module) -> None:
    """Give every merged layer its original weights back, bit for bit."""
    holder, state = holder_of("unmerge", model)
    merged = [method for method in methods_of(state) if method.merged(holder)]
    if not merged:
        raise ValueError("unmerge: the model is not merged")
    for method in merged:
        method.unmerge(holder)


def refuse_merged(op: str, model: nn.Module, state: Attachment) -> None:
    """Raise if an adapter is merged into the model's weights now."""
    if any(method.merged(model) for method in methods_of(state)):
        raise ValueError(f"{op}: the adapters are merged; unmerge them first")
