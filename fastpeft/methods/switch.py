"""Which adapters of an attached model act: active, disabled, merged into the frozen weights."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .attachment import holder_of, layers_of, original_names, refuse_merged


def set_adapter(model: nn.Module, names: str | Sequence[str], trainable: bool = True) -> None:
    """Make these adapters active and trainable (unless told otherwise), the others inactive and frozen.

    The terms of several active adapters add up. Of a module in modules_to_save only one active adapter may have a copy.
    """
    holder, state = holder_of("set_adapter", model)
    names = (names,) if isinstance(names, str) else tuple(dict.fromkeys(names))
    for name in names:
        if name not in state.configs:
            raise ValueError(f"set_adapter: no adapter {name!r}, expected one of {', '.join(state.configs)}")
    refuse_merged("set_adapter", holder, state)
    copies = [holder.get_submodule(path) for path in state.copies]
    for path, wrapper in zip(state.copies, copies, strict=True):
        if len([name for name in names if name in wrapper.copies]) > 1:
            raise ValueError(f"set_adapter: {list(names)} all have a copy of {path}, expected one active copy")
    for layer in layers_of(holder, state):
        layer.set_adapter([name for name in names if name in layer.adapters], trainable)
    for wrapper in copies:
        wrapper.set_active(next((name for name in names if name in wrapper.copies), None), trainable)
    state.active = names


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[nn.Module]:
    """Inside the ``with`` block the model computes what it did before it was attached to, trained biases included."""
    holder, state = holder_of("disable_adapter", model)
    layers = layers_of(holder, state)
    wrappers = [module for module in [*layers, *map(holder.get_submodule, state.copies)] if not module.disabled]
    merged = [layer for layer in layers if layer.merged]
    names = original_names(holder, state)
    for layer in merged:
        layer.unmerge()
    trained = {name: names[name].data for name in state.biases}
    _set_data(names, state.biases)
    _set_disabled(wrappers, True)
    try:
        yield model
    finally:
        _set_disabled(wrappers, False)
        _set_data(names, trained)
        for layer in merged:
            layer.merge()


def merge(model: nn.Module) -> None:
    """Add the active adapters to the frozen weights, so that the model runs at the speed of the base model.

    ``W + scale · B A`` is computed in float32 or wider and rounded once. The original weights are kept beside the
    merged ones, since subtracting would lose bits; ``detach(model, keep_merged=True)`` lets them go.

    Raises:
        ValueError: a layer cannot be merged (not finite, a bias without a place, a weight tied to another module);
            nothing has been changed then.
    """
    holder, state = holder_of("merge", model)
    refuse_merged("merge", holder, state)
    owners: dict[int, list[str]] = {}
    for name, parameter in holder.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    merged = []
    for path in state.linears:
        layer = holder.get_submodule(path)
        if not layer.active:
            continue
        tied = owners[id(layer.weight)]
        if len(tied) > 1:
            raise ValueError(f"merge: the weight of {path} is also {next(n for n in tied if not n.startswith(path))}")
        try:
            merged.append((layer, layer.merged_tensors()))
        except ValueError as error:
            raise ValueError(f"merge: {path}: {error}") from None
    if not merged:
        raise ValueError("merge: no adapter is active")
    for layer, tensors in merged:
        layer.merge(tensors)


def unmerge(model: nn.Module) -> None:
    """Give every merged layer its original weights back, bit for bit."""
    holder, state = holder_of("unmerge", model)
    merged = [layer for layer in layers_of(holder, state) if layer.merged]
    if not merged:
        raise ValueError("unmerge: the model is not merged")
    for layer in merged:
        layer.unmerge()


def _set_disabled(modules: Sequence[nn.Module], disabled: bool) -> None:
    for module in modules:
        module.disabled = disabled


def _set_data(parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].data = value
