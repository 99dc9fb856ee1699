"""The model's own modules and parameters, by the paths and names they had before anything was attached.

Where another module stands for one of them, it is looked through: a ``LoraLinear`` to its base layer, a ``TrainedCopy``
to its original, a layer whose rows are trained to the layer that they are rows of.
"""

from typing import Any

from torch import nn

from ..nn.live_slice import LiveSlice
from ..nn.protocol import is_added, original_child
from .attachment import attachment_of, original_name, original_names


def own_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The model's own parameters; one that has several names, by the first."""
    state = attachment_of(model)
    if state is None:
        return dict(model.named_parameters())
    return {name: p for name, p in original_names(model, state).items() if name in state.flags}


def own_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The model's own modules, every one once."""
    found: dict[str, nn.Module] = {}
    seen: set[nn.Module] = set()

    def visit(path: str, standing: nn.Module) -> None:
        module = innermost(standing)
        if module in seen or is_added(standing):
            return
        seen.add(module)
        found[path] = module
        for name, inner in module._modules.items():
            if inner is not None:
                visit(f"{path}.{name}" if path else name, inner)

    visit("", model)
    return found


def own_at(model: nn.Module, path: str) -> Any:
    """The model's own module at a path."""
    parent, name = place_of(model, path)
    return innermost(parent._modules[name])


def paths_of(model: nn.Module, module: nn.Module) -> list[str]:
    """Every path of one of its own modules, which may be a child of several (T5's embedding in older transformers)."""
    wrappers = {path: child for path, m in model.named_modules() if (child := original_child(m)) is not None}
    found = (path for path, m in model.named_modules(remove_duplicate=False) if m is module)
    return list(dict.fromkeys(original_name(path, wrappers) for path in found))


def place_of(model: nn.Module, path: str) -> tuple[Any, str]:
    """The module, and the name of its child, where the model's own module of this path stands, or what trains its rows.

    Inside of what stands for it: for an embedding that is copied for training, the copy's ``original_module``.
    """
    parent, name, module = model, "", model
    for part in path.split("."):
        parent, name, module = module, part, _child(module, part)
        while (child := original_child(module)) is not None:
            parent, name, module = module, child, _child(module, child)
    return parent, name


def innermost(module: Any) -> Any:
    """The model's own module that this one is or stands for."""
    while (child := original_child(module)) is not None:
        module = module._modules[child]
    return module.base_layer if isinstance(module, LiveSlice) else module


def _child(module: nn.Module, name: str) -> nn.Module:
    child = module._modules[name]
    if child is None:
        raise AttributeError(f"{type(module).__name__} has no module {name!r}")
    return child
