"""Which modules of a model are gated MLPs: by their children, their activation and the byte code of their forward."""

import functools
from typing import Any

import torch.nn.functional as F
from torch import nn

from .branch import own_path_reason

NAMES = ("gate_proj", "up_proj", "down_proj")
_KINDS = {  # in transformers.activations
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
}


def form_reason(module: nn.Module) -> str | None:
    """Why this module, which has the three projections, is no gated MLP as it is known; None where it is one.

    Args:
        module: The module.
    """
    if set(module._modules) - {"act_fn"} != set(NAMES):
        return f"it has the children {', '.join(module._modules)}"
    if module._parameters or module._buffers:
        return "it has parameters of its own"
    reason = own_path_reason(module)
    if reason is not None and reason != "has hooks":  # hooks on the whole run as ever
        return f"it {reason}"
    if activation_of(getattr(module, "act_fn", None)) is None:
        return f"its activation is {getattr(module, 'act_fn', None)}"
    code = getattr(type(module).forward, "__code__", None)
    if code is None or _shape(code) not in _forms():
        return f"the forward of {type(module).__qualname__} is another"
    return None


def activation_of(function: Any) -> str | None:
    """The activation's name as ``ops.lora_mlp`` has it, or None for one that it does not have.

    Args:
        function: A module or a function.
    """
    kind = type(function)
    if kind is nn.SiLU or function is F.silu:
        return "silu"
    if kind is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(function.approximate)
    if function is F.gelu:
        return "gelu"
    return _KINDS.get(kind.__name__) if kind.__module__ == "transformers.activations" else None


def _shape(code: Any) -> tuple:
    """What two functions of one meaning have alike, whatever they call their arguments and say in their docstrings."""
    return code.co_code, code.co_names, code.co_argcount, code.co_kwonlyargcount, code.co_flags & 0x0C, code.co_freevars


@functools.cache
def _forms() -> frozenset[tuple]:
    """The byte code of the ways in which models write the forward."""
    return frozenset(_shape(form.__code__) for form in (_returned, _assigned, _turned, _turned_assigned))


def _returned(self, x):
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def _assigned(self, x):
    y = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return y


def _turned(self, x):
    return self.down_proj(self.up_proj(x) * self.act_fn(self.gate_proj(x)))


def _turned_assigned(self, x):
    y = self.down_proj(self.up_proj(x) * self.act_fn(self.gate_proj(x)))
    return y
