"""Which adapters of an attached model act: active, disabled, merged into the frozen weights."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from .. import _check
from .attachment import Attachment, holder_of
from .carried import put_carried
from .claims import refuse_shared
from .method import Mergeable
from .originals import disabled
from .registry import mergeable_of, method_of, methods_of


def set_adapter(model: nn.Module, names: str | Sequence[str], trainable: bool = True) -> None:
    """Make these adapters active and trainable (unless told otherwise), the others inactive and frozen.

    The terms of several active LoRA adapters add up; bottleneck adapters follow one another. Of a module in
    modules_to_save, and of the methods that act once (prompts, selective), only one active adapter may have a part.

    Args:
        model: A model that adapters are attached to, or a wrapper around it.
        names: The names of the adapters, or a single one. Without any, the model computes as it did before it was
            attached to.
        trainable: Whether the active adapters ask for gradients.

    Raises:
        TypeError: ``names`` are no names.
        ValueError: There is no such adapter, these cannot act together, or the adapters are merged. Nothing has been
            changed then.
    """
    holder, state = holder_of("set_adapter", model)
    wanted = _check.names("set_adapter", "names", [names] if isinstance(names, str) else names)
    wanted = tuple(dict.fromkeys(wanted))
    for name in wanted:
        state.check_known("set_adapter", name)
    refuse_merged("set_adapter", holder, state)
    for method in methods_of(state):
        method.check_active("set_adapter", holder, wanted)
    refuse_shared("set_adapter", {repr(name): state.claims[name] | {*state.carried.get(name, ())} for name in wanted})
    # What leaves gives weights back before others take them; what checkpoints brought lies under all of it.
    staying = [name for name in wanted if name in state.active and not state.carried]
    for method in methods_of(state):
        method.set_active(holder, staying, trainable)
    put_carried(holder, state, wanted)
    for method in methods_of(state):
        method.set_active(holder, wanted, trainable)
    state.active = wanted


def active_adapters(model: nn.Module) -> tuple[str, ...]:
    """The names of the adapters that act, in the order in which they do.

    Args:
        model: A model that adapters are attached to, or a wrapper around it.

    Raises:
        ValueError: Nothing is attached to the model.
    """
    return holder_of("active_adapters", model)[1].active


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[nn.Module]:
    """Inside the ``with`` block the model computes what it did before it was attached to, trained biases included.

    Gradients stay, and a backward whose forward was before the block may come after it.

    Args:
        model: A model that adapters are attached to, or a wrapper around it; it is what the block is given.

    Raises:
        ValueError: Nothing is attached to the model.
    """
    holder, _ = holder_of("disable_adapter", model)
    with disabled(holder):
        yield model


def merge(model: nn.Module, dequantise: bool = False) -> None:
    """Add the active adapters to the frozen weights, so that the model runs at the speed of the base model.

    ``W + scale · B A`` is computed in float32 or wider and rounded once. The original weights are kept beside the
    merged ones, since subtracting would lose bits; ``detach(model, keep_merged=True)`` lets them go.

    A weight in 4 or 8 bits is quantised again, as PEFT does it, which rounds small terms away.

    Args:
        model: A model that adapters are attached to, or a wrapper around it.
        dequantise: Whether a quantised layer becomes a plain one instead, in the dtype in which it is computed, for as
            long as the model is merged; nothing else is lost then than by rounding the sum to that dtype.

    Raises:
        TypeError: ``dequantise`` is neither True nor False.
        ValueError: An active adapter is no term of a weight (bottleneck, prompt), or a layer cannot be merged (not
            finite, a bias without a place, a weight tied to another module). Nothing has been changed then.
    """
    _check.boolean("merge", "dequantise", dequantise)
    holder, state = holder_of("merge", model)
    refuse_merged("merge", holder, state)
    for name in state.active:
        for config in state.parts(name):
            method = method_of("merge", config)
            if not isinstance(method, Mergeable):
                raise ValueError(f"merge: adapter {name!r} is {method.title}, which cannot be: {method.unmergeable}")
    ready = [
        run for run in (method.prepare_merge(holder, dequantise) for method in mergeable_of(state)) if run is not None
    ]
    if not ready:
        raise ValueError("merge: no adapter is active")
    for run in ready:
        run()


def unmerge(model: nn.Module) -> None:
    """Give every merged layer its original weights back, bit for bit.

    Args:
        model: A merged model, or a wrapper around it.

    Raises:
        ValueError: The model is not merged.
    """
    holder, state = holder_of("unmerge", model)
    merged = [method for method in mergeable_of(state) if method.merged(holder)]
    if not merged:
        raise ValueError("unmerge: the model is not merged")
    for method in merged:
        method.unmerge(holder)


def refuse_merged(op: str, model: nn.Module, state: Attachment) -> None:
    """Raise if an adapter is merged into the model's weights now."""
    if any(method.merged(model) for method in mergeable_of(state)):
        raise ValueError(f"{op}: the adapters are merged; unmerge them first")
