"""What a layer found out about itself holds until something that it read has changed: which things those are.

``guards`` is what ``fastpeft._host.guards`` gives. Asked before every call, it compares all that is named here by
identity in a microsecond, where finding out anew takes ten.
"""

from typing import Any

from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as global_hooks

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
GLOBAL_HOOKS = (
    global_hooks._global_forward_hooks,
    global_hooks._global_forward_pre_hooks,
    global_hooks._global_backward_hooks,
    global_hooks._global_backward_pre_hooks,
)


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


def guard_lora(guards: Any, layer: Any) -> None:
    """All that ``LoraLinear.fastpeft_branch`` reads of a layer with one active adapter."""
    for name in ("disabled", "merged", "active", "training", "_modules"):
        guard_item(guards, layer.__dict__, name)
    modules, adapters = layer._modules, layer._modules["adapters"]
    guard_child(guards, modules, "base_layer")
    guards.is_(modules, "adapters", adapters)
    for name in layer.active:
        guard_child(guards, adapters._modules, name, ("lora_A", "lora_B", "lora_bias"))
        for number in ("scale", "dropout"):
            guard_item(guards, adapters._modules[name].__dict__, number)
