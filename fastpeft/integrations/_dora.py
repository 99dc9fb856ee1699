"""DoRA in a PEFT LoRA layer: which of its calls the fused op serves, and the call. Nothing here imports peft."""

from typing import Any

import torch
from torch import Tensor

from .. import ops
from .._check import PLAIN
from ..nn import quantised
from ..nn.branch import own_path_reason
from ..nn.guarding import guard_child, guard_item
from ..nn.sharing import Branch

_VARIANT = "peft.tuners.lora.variants", "DoraLinearVariant"
_LAYER = "peft.tuners.lora.dora", "DoraLinearLayer"


class Dora(list):
    """The one branch of a layer whose adapter is DoRA; ``magnitude`` is the norms that its rows are given."""

    magnitude: Tensor


def magnitude_of(layer: Any, name: str, variants: Any) -> Tensor | str:
    """The magnitude of an adapter that is no plain LoRA, or what it is instead of DoRA."""
    if name in variants and _kind(variants[name]) != _VARIANT:
        kind = variants[name] if isinstance(variants[name], type) else type(variants[name])
        return f"the variant {kind.__qualname__}"
    modules = layer._modules.get("lora_magnitude_vector")
    found: Any = None if modules is None else modules._modules.get(name)
    if found is None or _kind(found) != _LAYER:
        return "the variant DoRA without a magnitude for linear layers"
    reason = own_path_reason(found)
    return found.weight if reason is None else f"DoRA, whose magnitude {reason}"


def guard(layer: Any, guards: Any, name: str) -> None:
    """What is read of a layer because this adapter is DoRA."""
    modules = layer._modules
    guard_item(guards, layer.__dict__, "training")
    guards.is_(modules, "lora_magnitude_vector", modules["lora_magnitude_vector"])
    guard_child(guards, modules["lora_magnitude_vector"]._modules, name, ("weight",))


def planned(branches: list[Branch], magnitude: Tensor) -> Dora | str:
    """The plan for a layer among whose active adapters one is DoRA, or why PEFT serves the call."""
    if len(branches) > 1:
        return "several adapters are active, of which one is DoRA"
    (branch,) = branches
    if branch.lora_bias is not None:
        return "its adapter is DoRA with a bias of lora_B"
    if isinstance(branch.scale, Tensor):
        return "its adapter is DoRA, and its scaling is a tensor"
    if isinstance(branch.weight, Tensor) and branch.weight.requires_grad:
        return "its adapter is DoRA, and base_layer.weight is trained"
    found = Dora(branches)
    found.magnitude = magnitude
    return found


def unfit(x: Tensor, plan: Dora, given: bool) -> str | None:
    """Why the op cannot serve x, of what is DoRA's alone; not ``given``, it stands for any of the base's dtype."""
    magnitude, (branch,) = plan.magnitude, plan
    if type(magnitude) not in PLAIN or magnitude.device != x.device:
        return f"the magnitude is a {type(magnitude).__name__} on {magnitude.device}, the input on {x.device}"
    if magnitude.dtype not in (x.dtype, branch.lora_a.dtype, torch.float32):
        return f"the magnitude is {magnitude.dtype}, the input {x.dtype}"
    computed = quantised.computed_dtype(x)
    if given and isinstance(branch.weight, ops.Base) and branch.weight.dtype not in (None, computed):
        return f"its adapter is DoRA, and base_layer computes in {branch.weight.dtype}, the input is {computed}"
    return None


def run(x: Tensor, plan: Dora) -> Tensor:
    """The fused op."""
    weight, a, b, bias, scale, dropout, _ = plan[0]
    magnitude = plan.magnitude
    if magnitude.dtype not in (x.dtype, a.dtype):
        magnitude = magnitude.to(a.dtype)
    bias = quantised.fitting_bias(bias, weight, x, a.dtype)
    return ops.dora_linear(x, weight, a, b, magnitude, bias, scale, dropout)


def _kind(value: Any) -> tuple[str, str]:
    kind = value if isinstance(value, type) else type(value)
    return kind.__module__, kind.__qualname__
