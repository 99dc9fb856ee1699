"""The gated MLP of a transformers model as one op, where it has LoRA layers for its three projections.

    y = down_proj(act_fn(gate_proj(x)) · up_proj(x))

Such a module is found by what it is: children ``gate_proj``, ``up_proj``, ``down_proj``, an ``act_fn`` that is known,
and a forward whose byte code is that line's, in one of the ways in which it is written. It is given a class of its own,
derived from the one it has, whose forward calls ``ops.lora_mlp``, or ``ops.dora_mlp`` where an adapter is DoRA; what is
unusual at a call (hooks on its children, several adapters, disabled or merged ones, a class that somebody patched
since, few rows over quantised weights) is seen there, and the module's own forward runs.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from .._check import PLAIN
from . import plain, quantised
from .backend import serving_backend
from .branch import Branch, own_path_reason
from .gated_mlps import NAMES, activation_of, form_reason
from .guarding import GLOBAL_HOOKS, guard_call, guard_item, keep, kept, state_without_kept


class _Plan(NamedTuple):
    """What ``ops.lora_mlp`` or ``ops.dora_mlp`` is called with beside x."""

    branches: tuple[Branch, Branch, Branch]
    magnitudes: tuple[Tensor | None, ...]  # of those that are DoRA; empty where none is
    activation: str
    quantised: bool  # whether a weight is, so that what decides is also how many rows x has


class LoraMlp(nn.Module):
    """The forward of a gated MLP with LoRA; the class of the model's own module stands behind it."""

    fastpeft_kind = "gated MLPs"
    fastpeft_plain: type[nn.Module]  # the module's own class
    fastpeft_known: Callable  # and its forward, which was compared

    def forward(self, x: Tensor) -> Tensor:
        """``down_proj(act_fn(gate_proj(x)) · up_proj(x))``.

        Args:
            x: ``[..., K]``.

        Returns:
            ``[..., N]``.
        """
        plan: Any
        if torch.compiler.is_compiling():
            plan = _plan(self, x)
        else:
            plan = kept(self, x) if self.fastpeft_plain.forward is self.fastpeft_known else None
            if plan is None:
                plan = keep(self, x, _plan(self, x))
        if isinstance(plan, str) or (plan.quantised and _called(x, plan.branches)):
            return super().forward(x)
        if plan.magnitudes and _trains(plan.branches):
            return super().forward(x)
        return _run(x, plan)

    def fastpeft_guard(self, guards: Any) -> None:
        """All that is read of the module to decide how a call is computed.

        Args:
            guards: What is told.
        """
        modules = self._modules
        guard_item(guards, self.__dict__, "_modules")
        for name in NAMES:
            module: Any = modules[name]
            guards.is_(modules, name, module)
            guard_call(guards, module)
            module.fastpeft_guard(guards)
        activation: Any = modules.get("act_fn")
        if activation is not None:
            guards.is_(modules, "act_fn", activation)
            guard_call(guards, activation)
            guard_item(guards, activation.__dict__, "approximate")
        else:
            guard_item(guards, self.__dict__, "act_fn")

    def fastpeft_report(self) -> str:
        """``"fused"``, or why the module's own forward runs as things stand."""
        reason = _plan(self, None)
        if "forward" in self.__dict__:
            return "its forward is overridden on the instance"
        return reason if isinstance(reason, str) else "fused"

    def fastpeft_backend(self) -> str:
        """The backend for an x of one row."""
        plan = _plan(self, None)
        if isinstance(plan, str):
            return plan
        weights, lora_as = [branch.weight for branch in plan.branches], [branch.lora_a for branch in plan.branches]
        x = lora_as[0].new_empty(1, lora_as[0].shape[1], dtype=_input(plan.branches).dtype)
        return serving_backend("dora_mlp" if plan.magnitudes else "lora_mlp", x, weights, lora_as=lora_as)

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return _rebuilt, (self.fastpeft_plain,), state_without_kept(self)


def fuse_mlps(model: nn.Module, takes_part: Callable[[nn.Module], bool]) -> list[nn.Module]:
    """Have the gated MLPs in ``model`` computed as one op each.

    Args:
        model: The model.
        takes_part: Whether a module is a LoRA layer that can be part of one; it then has what ``protocol.Sharing``
            declares.

    Returns:
        Those that were found. Each is of a class derived from its own, until ``unfuse_mlps``.
    """
    found = []
    for module in model.modules():
        children = [module._modules.get(name) for name in NAMES]
        if any(child is None or not takes_part(child) for child in children):
            continue
        if isinstance(module, LoraMlp) or form_reason(module) is not None:
            continue
        kind: Any = type(module)
        module.__class__ = _class_of(kind)
        found.append(module)
    return found


def unfuse_mlps(model: nn.Module) -> None:
    """Take back ``fuse_mlps``: every module is of its own class again.

    Args:
        model: The model whose MLPs were fused.
    """
    fused: list[Any] = [module for module in model.modules() if isinstance(module, LoraMlp)]
    for module in fused:
        if type(module) is _class_of(module.fastpeft_plain):
            module.__dict__.pop("fastpeft_kept", None)
            module.__class__ = module.fastpeft_plain


def _plan(module: Any, x: Tensor | None) -> _Plan | str:
    """What computes a call, or why the module's own forward does; x None stands for any that fits."""
    if module.fastpeft_plain.forward is not module.fastpeft_known:
        return f"the forward of {module.fastpeft_plain.__qualname__} was replaced"
    activation = activation_of(module.act_fn)
    if activation is None:
        return f"its activation is {module.act_fn}"
    if isinstance(module.act_fn, nn.Module) and own_path_reason(module.act_fn) is not None:
        return f"its activation {own_path_reason(module.act_fn)}"
    found = []
    for name in NAMES:
        projection = _projection(module._modules[name])
        if isinstance(projection, str):
            return f"{name}: {projection}"
        found.append(projection)
    (gate, up, down), magnitudes = zip(*found, strict=True)
    branches, dora = (gate, up, down), any(magnitude is not None for magnitude in magnitudes)
    written = any(isinstance(branch.weight, ops.Base) for branch in branches)
    if dora and _trains(branches):
        return "an adapter is DoRA, and the weight of a projection is trained"
    x = _input(branches) if x is None else x
    return _unfit(x, branches) or _Plan(branches, magnitudes if dora else (), activation, written)


def _projection(child: Any) -> tuple[Branch, Tensor | None] | str:
    """A projection as its layer tells it, or why it is computed by itself."""
    if not hasattr(type(child), "fastpeft_projection"):
        return f"it is a {type(child).__qualname__} without a fused adapter"
    reason = own_path_reason(child)
    found = f"it {reason}" if reason is not None else child.fastpeft_projection()
    if isinstance(found, str):
        return found
    branch, magnitude = found
    given = (*branch[:4], branch.lora_bias, magnitude)
    other = next((t for t in given if t is not None and not isinstance(t, ops.Base) and type(t) not in PLAIN), None)
    if other is None and magnitude is not None and magnitude.device != branch.lora_a.device:
        return f"its magnitude is on {magnitude.device}, its adapter on {branch.lora_a.device}"
    return found if other is None else f"a parameter is a {type(other).__name__}"


def _trains(branches: Sequence[Branch]) -> bool:
    """Whether a weight asks for a gradient, which DoRA gives none."""
    return any(isinstance(branch.weight, Tensor) and branch.weight.requires_grad for branch in branches)


def _input(branches: Sequence[Branch]) -> Tensor:
    """An x without rows that fits these."""
    dtype = next((branch.weight.dtype for branch in branches if branch.weight.dtype is not None), None)
    lora_a = branches[0].lora_a
    return lora_a.new_empty(0, lora_a.shape[1], dtype=dtype)


def _unfit(x: Any, branches: tuple[Branch, Branch, Branch]) -> str | None:
    """Why these branches and this x cannot be one call."""
    gate, up, down = branches
    if type(x) not in PLAIN or plain.is_plain(x):
        return "the input is no plain tensor, or a transform is active"
    if any(GLOBAL_HOOKS):
        return "hooks for all modules are active"
    if gate.weight.shape != up.weight.shape or down.weight.shape[1] != gate.weight.shape[0]:
        return "the sizes of its projections differ"
    if any(branch.lora_a.dtype != gate.lora_a.dtype for branch in branches):
        return "its adapters differ in dtype"
    if any(t.device != x.device for branch in branches for t in (branch.weight, branch.lora_a)):
        return "its projections are on several devices"
    dtypes = {branch.weight.dtype for branch in branches if not isinstance(branch.weight, ops.Base)}
    if x.device.type in ("cpu", "cuda") and x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        return "float64 under autocast" if torch.float64 in (*dtypes, gate.lora_a.dtype) else None
    if gate.lora_a.dtype not in (x.dtype, torch.promote_types(x.dtype, torch.float32)):
        return f"the input is {x.dtype}, its adapters {gate.lora_a.dtype}"
    return None if dtypes <= {x.dtype} else f"the input is {x.dtype}, its projections differ"


def _called(x: Tensor, branches: Sequence[Branch]) -> bool:
    """Whether quantised layers are to be called as they are for this x, which ``quantised.is_called`` tells each."""
    if x.numel() <= quantised.FEW_ROWS * x.shape[-1]:
        return True
    wanted, weights = quantised.computed_dtype(x), [branch.weight for branch in branches]
    return any(isinstance(weight, ops.Base) and weight.dtype not in (None, wanted) for weight in weights)


def _run(x: Tensor, plan: _Plan) -> Tensor:
    columns: list[Any] = [*zip(*plan.branches, strict=True)]
    weights, lora_as, lora_bs, _, scales, dropouts, _ = columns
    biases = [branch.folded_bias() for branch in plan.branches]
    settings = biases, scales, dropouts
    if plan.magnitudes:
        kinds = x.dtype, lora_as[0].dtype
        magnitudes = [m if m is None or m.dtype in kinds else m.to(kinds[1]) for m in plan.magnitudes]
        y = ops.dora_mlp(x, weights, lora_as, lora_bs, magnitudes, *settings, activation=plan.activation)
    else:
        y = ops.lora_mlp(x, weights, lora_as, lora_bs, *settings, activation=plan.activation)
    return quantised.as_given(y, weights[2], x)


@functools.cache
def _class_of(kind: Any) -> Any:
    """The class of a fused module that was of this class; it has its name, for whoever prints or asks for it."""
    attributes = {"fastpeft_plain": kind, "fastpeft_known": staticmethod(kind.forward)}
    attributes |= {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (LoraMlp, kind), attributes)


def _rebuilt(kind: Any) -> nn.Module:
    """What a copy or a pickle begins with."""
    fused = _class_of(kind)
    return fused.__new__(fused)
