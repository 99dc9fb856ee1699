"""The whole of a layer's call in one call of the host, where nothing but x is new.

A layer that found out what it computes keeps that with guards (``guarding``). Where it is one call of ``lora_linear``,
by itself or beside siblings that receive the same x (``sharing``), the host asks the guards, runs the plan and
hands out what a sibling has computed already. Whatever is not as usual (checkpoints, other threads' splits, casts of
autocast, weights in codes) it leaves to the layer's own ``forward``.
"""

from typing import Any

from torch import Tensor

from .. import _host
from .._check import PLAIN
from ..ops.lora_linear_bound import bound
from .branch import Branch
from .guarding import guard_item


def computed(layer: Any, x: Tensor) -> Tensor | None:
    """The layer's output, or None: then the layer computes it."""
    found = layer.__dict__.get("fastpeft_kept")
    return None if found is None or found[3] is None else found[3](layer, x)


def front(layer: Any, guards: Any, value: object) -> Any:
    """What ``computed`` calls, or None where the layer always computes by itself.

    Args:
        layer: The layer, which may be a sibling of others.
        guards: What holds as long as the layer computes this; they are told of the siblings.
        value: What it computes: a branch, by itself or as the only one of a list.
    """
    branch = value[0] if type(value) is list and len(value) == 1 else value
    if not isinstance(branch, Branch) or type(branch.weight) not in PLAIN:
        return None
    if branch.lora_bias is not None or isinstance(branch.scale, Tensor):
        return None
    alone = bound(*([item] for item in branch[:6]))
    if alone is None:
        return None
    guard_item(guards, layer.__dict__, "fastpeft_shared")
    group = layer.fastpeft_shared
    part = None if group is None else group.part(layer, guards)
    host: Any = _host.serving()
    return host.Front(layer, guards, branch, alone, *((None, None, None) if part is None else (group, *part)))
