"""What a layer found out about itself holds until something that it read has changed: which things those are.

``guards`` is what ``fastpeft._host.guards`` gives. Asked before every call, it compares all that is named here by
identity in a microsecond, where finding out anew takes ten.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as global_hooks

from .. import _host

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
GLOBAL_HOOKS = (
    global_hooks._global_forward_hooks,
    global_hooks._global_forward_pre_hooks,
    global_hooks._global_backward_hooks,
    global_hooks._global_backward_pre_hooks,
)


def kept(layer: Any, x: Tensor | None) -> Any:
    """What ``keep`` was given for this layer where it holds for this input (None: for one like that); else None."""
    found = layer.__dict__.get("fastpeft_kept")
    # A replica copies the dictionary, and what is in it is another layer's.
    return found[2] if found is not None and found[0] is layer and found[1](x) else None


def keep(layer: Any, x: Tensor, value: Any, front: Callable[..., Any] | None = None) -> Any:
    """Keep what a layer found out about itself from what its ``fastpeft_guard`` names, for inputs like x; not reasons.

    Args:
        layer: The layer.
        x: An input.
        value: What it found out.
        front: Makes of the layer, the guards and the value what computes the layer's calls in one; see ``front``.

    Returns:
        The value.
    """
    guards = None if isinstance(value, str) else _host.guards()
    if guards is not None:
        layer.fastpeft_guard(guards)
        guard_process(guards)
        guards.input(x)
        layer.__dict__["fastpeft_kept"] = layer, guards, value, front and front(layer, guards, value)
    return value


def state_without_kept(layer: Any) -> dict:
    """A layer's state to be copied or pickled."""
    return {name: value for name, value in layer.__dict__.items() if name != "fastpeft_kept"}


def guard_item(guards: Any, dictionary: dict, key: str) -> None:
    """What the dictionary holds under the key, or that it holds nothing."""
    guards.is_(dictionary, key, dictionary[key]) if key in dictionary else guards.absent(dictionary, key)


def guard_call(guards: Any, module: nn.Module) -> None:
    """That calling the module is running its class's forward."""
    guards.type(module)
    guards.absent(module.__dict__, "forward")
    guards.absent(module._modules, "parametrizations")
    for hooks in _HOOKS:
        guard_item(guards, module.__dict__, hooks)
        guards.empty(module.__dict__[hooks])


def guard_child(guards: Any, modules: dict, name: str, tensors: tuple[str, ...] = ("weight", "bias")) -> None:
    """A child that is not called but read: that it is there, its call, its tensors, their dtypes and devices."""
    module = modules[name]
    guards.is_(modules, name, module)
    guard_call(guards, module)
    guard_item(guards, module.__dict__, "_parameters")
    for tensor in tensors:
        owner = module._parameters if tensor in module._parameters else module.__dict__
        guard_item(guards, owner, tensor)
        if isinstance(owner.get(tensor), Tensor):
            guards.tensor(owner[tensor])


def guard_process(guards: Any) -> None:
    """Hooks for all modules, and forward-mode gradients."""
    for hooks in GLOBAL_HOOKS:
        guards.empty(hooks)
    guards.is_(vars(forward_ad), "_current_level", forward_ad._current_level)


def guard_lora(layer: Any, guards: Any) -> None:
    """All that ``LoraLinear.fastpeft_projection`` reads of a layer with one active adapter.

    Args:
        layer: The layer; this is a method of it.
        guards: What is told.
    """
    for name in ("disabled", "merged", "active", "training", "_modules"):
        guard_item(guards, layer.__dict__, name)
    modules, adapters = layer._modules, layer._modules["adapters"]
    guard_child(guards, modules, "base_layer")
    guards.is_(modules, "adapters", adapters)
    for name in layer.active:
        guard_child(guards, adapters._modules, name, ("lora_A", "lora_B", "lora_bias", "lora_magnitude"))
        for number in ("scale", "dropout"):
            guard_item(guards, adapters._modules[name].__dict__, number)
