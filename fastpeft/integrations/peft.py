"""PEFT's LoRA layers served by the fused op: the same modules, parameter names and checkpoints, another forward.

    model = fastpeft.accelerate(get_peft_model(model, config))     # swap the layers of an existing model, in place
    fastpeft.register(config)                                      # or have PEFT build them, before get_peft_model

Around bitsandbytes' layers the weight is written out where it is read. Any other base that cannot be read (of another
library, hooked, a subclass of nn.Linear) is called as it is, and the low-rank term, still fused, is added to what it
gives. DoRA has an op of its own. A call that no op can serve (other variants, mixed batches, merged or disabled
adapters, hooks on the inner modules, ...) runs PEFT's own forward. ``fastpeft.report(model)`` says which layers, why.
Three differences remain: dropout masks come from another generator than ``torch.nn.Dropout``'s; gradients of gradients
are not defined; and the input itself is kept for backward, so it must not be modified in place after the call (PEFT
keeps a copy where there is dropout or a float32 adapter).
"""

import functools
import importlib
import re
from typing import Any

import torch
from torch import Tensor, nn

from .. import _check
from ..nn import LoraLinear, lora_mlp, quantised, sharing
from ..nn.backend import serving_backend
from ..nn.experts_call import layout_of
from ..nn.front import computed
from ..nn.guarding import state_without_kept
from ..nn.read_past import read_past
from . import _dora, _embeddings, _experts, _fusable
from ._layers import layers_of, refuse_unfused

_OLDEST = (0, 15)

try:
    import peft
    from peft.tuners.lora import LoraConfig
    from peft.tuners.lora import layer as _layers
    from peft.tuners.lora.layer import Linear, LoraLayer, dispatch_default
    from transformers.pytorch_utils import Conv1D
except ImportError as error:
    raise ImportError(
        "fastpeft.integrations.peft: peft does not import, expected peft>=0.15 (pip install 'fastpeft[peft]')"
    ) from error
if tuple(int(part) for part in re.findall(r"\d+", peft.__version__)[:2]) < _OLDEST:
    raise ImportError(f"fastpeft.integrations.peft: peft has version {peft.__version__}, expected >=0.15")
ParamWrapper: Any = getattr(_layers, "ParamWrapper", LoraLayer)  # PEFT has it since 0.17


class FastParamWrapper(_experts.ExpertsForward, ParamWrapper):
    """PEFT's LoRA on a parameter of experts; ``forward`` goes to the fused op wherever that serves."""


# PEFT knows its wrappers by this name where it adds another adapter, and prints it.
FastParamWrapper.__name__ = ParamWrapper.__name__


class FastForward(nn.Module):
    """What PEFT's LoRA layers around linear layers are given: ``forward`` goes to the fused op where that serves."""

    fastpeft_kind = LoraLinear.fastpeft_kind
    fastpeft_shared: sharing.SharedInput | None = None

    def _get_name(self):  # for repr, and for PEFT's status of layers, which reads it
        return next(_THEIRS[kind].__name__ for kind in type(self).__mro__ if kind in _THEIRS)

    def __getstate__(self) -> dict:
        return state_without_kept(self)

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        if not args and not kwargs:
            compiling = torch.compiler.is_compiling()
            if not compiling and (y := computed(self, x)) is not None:
                return y
            plan = _fusable.plan(self, x) if compiling else _fusable.kept_plan(self, x)
            if not isinstance(plan, str):
                if _fusable.alone(x, plan):
                    return _fusable.beside(self, x, plan)
                shared = None if compiling else self.fastpeft_shared
                y = None if shared is None else shared.forward(self, x, _shared_branch(self, plan))
                y = _fusable.run(x, plan) if y is None else y
                return quantised.as_given(y, plan[0].weight, x)
        return super().forward(x, *args, **kwargs)

    def fastpeft_branch(self) -> sharing.Branch | str:
        """This layer for ``fastpeft.nn.sharing``, or why it computes alone."""
        plan = _fusable.plan(self) if torch.compiler.is_compiling() else _fusable.kept_plan(self)
        return plan if isinstance(plan, str) else _shared_branch(self, plan)

    def fastpeft_projection(self) -> tuple[sharing.Branch, Tensor | None] | str:
        """This layer for ``fastpeft.nn.lora_mlp``, with the magnitude of DoRA, or why it computes alone."""
        plan = _fusable.plan(self) if torch.compiler.is_compiling() else _fusable.kept_plan(self)
        branch = plan if isinstance(plan, str) else _single_branch(self, plan)
        if isinstance(branch, str):
            return branch
        return branch, plan.magnitude if isinstance(plan, _dora.Dora) else None

    fastpeft_guard = _fusable.guard

    def fastpeft_backend(self) -> str:
        """The backend for an x of one row and the first active adapter."""
        plan = _fusable.plan(self)
        if isinstance(plan, str):
            return plan
        weight, lora_a = plan[0].weight, plan[0].lora_a
        x = lora_a.new_empty(1, lora_a.shape[1], dtype=None if weight is None else weight.dtype)
        return serving_backend("dora_linear" if isinstance(plan, _dora.Dora) else "lora_linear", x, weight, lora_a)

    def fastpeft_report(self) -> str:
        """``"fused"``, "fused beside its base" and why, or why PEFT's own forward serves this layer as it is now."""
        return _report(self)


class FastLoraLinear(FastForward, Linear):
    """PEFT's LoRA layer around ``nn.Linear`` or ``Conv1D``; ``forward`` goes to the fused op wherever that serves."""


class FastLoraEmbedding(_embeddings.EmbeddingForward, _layers.Embedding):
    """PEFT's LoRA layer around ``nn.Embedding``; ``forward`` goes to the fused op wherever that serves."""


FastLoraEmbedding.__name__ = _layers.Embedding.__name__  # for repr, and for PEFT's status of layers, which reads it
_THEIRS: dict[type, type] = {FastLoraLinear: Linear, FastParamWrapper: ParamWrapper}
_THEIRS[FastLoraEmbedding] = _layers.Embedding
_OURS: dict[type, type] = {Linear: FastLoraLinear, _layers.Embedding: FastLoraEmbedding}
# Modules of PEFT's with layers around a quantised one, all of which call that and add the low-rank terms to its output.
_QUANTISED = ("bnb", "gptq", "awq", "hqq", "eetq", "aqlm", "inc", "torchao")


def accelerate(model: nn.Module, strict: bool = False, share_inputs: bool = True, fuse_mlp: bool = True) -> nn.Module:
    """Serve the LoRA layers of a PEFT model by the fused op: ``fastpeft.accelerate`` for them alone.

    Args:
        model: a PeftModel, or any module with PEFT's LoRA layers inside.
        strict: raise if any LoRA layer would keep PEFT's own forward.
        share_inputs: let siblings that receive the same tensor (q, k, v; gate, up) read it once; same result.
        fuse_mlp: compute a gated MLP whose three projections have LoRA as one op, which keeps and needs less memory.
    """
    layers = _lora_layers("accelerate", model)
    if strict:
        passed = read_past(model)
        reports = {n: f"its weight is {passed[n]}" if n in passed else _report(m) for n, m in layers.items()}
        reasons = {name: None if report.startswith("fused") else report for name, report in reports.items()}
        refuse_unfused(reasons, "LoRA layers")
    for layer in layers.values():
        ours = _ours(type(layer))
        if ours is not None:
            layer.__class__ = ours
        elif _around_experts(layer):
            layer.__class__ = FastParamWrapper
    sharing.unshare_inputs(model)
    if share_inputs:
        sharing.share_inputs(model, lambda module: isinstance(module, FastForward))
    lora_mlp.unfuse_mlps(model)
    if fuse_mlp:
        lora_mlp.fuse_mlps(model, lambda module: isinstance(module, FastForward))
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undo ``accelerate`` and ``register``, as ``fastpeft.restore`` does.

    Args:
        model: as ``accelerate`` was given.
    """
    layers = _lora_layers("restore", model)
    for name, layer in layers.items():
        ours = next((kind for kind in _THEIRS if isinstance(layer, kind)), None)
        if ours is not None and type(layer) is not ours:
            raise ValueError(f"restore: {name} is {type(layer).__name__}, expected {ours.__name__}")
    sharing.unshare_inputs(model)
    lora_mlp.unfuse_mlps(model)
    for layer in layers.values():
        layer.__dict__.pop("fastpeft_kept", None)
        layer.__class__ = _THEIRS.get(type(layer), type(layer))
    return model


def register(lora_config: LoraConfig) -> LoraConfig:
    """Have PEFT build fused layers for this config wherever the layer to adapt is exactly nn.Linear or Conv1D.

    bitsandbytes' layers are served too; others get the layer that PEFT has for them. The setting is not saved with the
    config.
    Modules of your own are registered with PEFT before this call: PEFT asks them in order.

    Args:
        lora_config: before ``get_peft_model``.

    Returns:
        The same config.

    Raises:
        TypeError: ``lora_config`` is no LoraConfig.
        ValueError: it maps nn.Linear or Conv1D to another layer already.
    """
    if not isinstance(lora_config, LoraConfig):
        raise TypeError(f"register: lora_config is {_check.shown(lora_config)}, expected peft.LoraConfig")
    for kind in (nn.Linear, Conv1D):
        present = (lora_config._custom_modules or {}).get(kind)
        if present is not None and getattr(present, "func", None) is not _build:
            raise ValueError(f"register: lora_config maps {kind.__name__} to {present}, expected nothing")
    # A partial of the config, not a closure: a deep copy of the config then refers to the copy.
    build: Any = functools.partial(_build, lora_config)
    lora_config._register_custom_module({nn.Linear: build, Conv1D: build})
    return lora_config


def describe(module: nn.Module) -> tuple[str, str] | None:
    """(kind, why it is not fused) of a layer that ``accelerate`` has not been called on; None for any other module."""
    if not isinstance(module, LoraLayer):
        return None
    own = f"{type(module).__name__} is PEFT's own layer; fastpeft.accelerate has not been called on it"
    served = _ours(type(module)) is not None or _around_experts(module)
    return LoraLinear.fastpeft_kind, own if served else _report(module)


def _build(lora_config: LoraConfig, target: nn.Module, adapter_name: str, **kwargs) -> FastForward | None:
    """PEFT's layer for ``target`` with our forward; None makes PEFT go on to its own layers."""
    known = quantised.kind_of(target)
    if known is None and (type(target) not in (nn.Linear, Conv1D) or type(target.weight) is not nn.Parameter):
        return None
    if kwargs.get("parameter_name") is not None:
        return None
    if "config" not in kwargs:  # PEFT < 0.19 gives a custom module the config's fields, and its own layers the config
        kwargs["lora_config"] = lora_config
    layer: Any = None
    if known is not None:
        from peft.tuners.lora import bnb

        dispatch = bnb.dispatch_bnb_4bit if known == "Linear4bit" else bnb.dispatch_bnb_8bit
        layer = dispatch(target, adapter_name, **kwargs)  # None where the model was not loaded so
    layer = layer or dispatch_default(target, adapter_name, **kwargs)
    ours = _ours(type(layer))
    if ours is not None:
        layer.__class__ = ours
    return layer


def _ours(theirs: Any) -> Any:
    """Our class in place of one of PEFT's, or None."""
    if theirs in _OURS:
        return _OURS[theirs]
    package, _, module = theirs.__module__.rpartition(".")
    if package != "peft.tuners.lora" or module not in _QUANTISED or not issubclass(theirs, LoraLayer):
        return None
    made = type(f"Fast_{module}_{theirs.__name__}", (FastForward, theirs), {"__module__": __name__})
    _THEIRS[made], _OURS[theirs] = theirs, made
    return made


def __getattr__(name: str) -> type:
    """The classes around PEFT's quantised layers, which are made when they are first needed; pickle asks here."""
    _, _, rest = name.partition("Fast_")
    module, _, theirs = rest.partition("_")
    if module in _QUANTISED:
        found = getattr(importlib.import_module(f"peft.tuners.lora.{module}"), theirs, None)
        ours = None if found is None else _ours(found)
        if ours is not None:
            return ours
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _shared_branch(layer: Any, plan: list[sharing.Branch]) -> sharing.Branch | str:
    return "its adapter is DoRA" if isinstance(plan, _dora.Dora) else _single_branch(layer, plan)


def _single_branch(layer: Any, plan: list[sharing.Branch]) -> sharing.Branch | str:
    if len(plan) > 1:
        return "several adapters are active"
    if isinstance(plan[0].scale, Tensor):
        return "its scaling is a tensor"
    if plan[0].weight is None:
        return "its base layer is called"
    if quantised.own_bias(plan[0].weight, plan[0].bias, plan[0].lora_a):
        return "its bias has a dtype of its own"
    return "its base layer is a Conv1D" if _fusable.is_conv1d(layer._modules["base_layer"]) else plan[0]


def _lora_layers(op: str, model: nn.Module) -> dict[str, Any]:
    return layers_of(op, model, LoraLayer, "no LoRA layer, expected a PEFT model with a LoRA adapter")


def _report(layer: Any) -> str:
    if isinstance(layer, _layers.Embedding):
        return _embeddings.report(layer)
    if isinstance(layer, FastForward) or _ours(type(layer)) is not None:
        plan = _fusable.plan(layer)
        return plan if isinstance(plan, str) else _fusable.described(plan)
    if isinstance(layer, FastParamWrapper) or _around_experts(layer):
        found = _experts.plan(layer)
        return found if isinstance(found, str) else "fused"
    if type(layer) is ParamWrapper:
        return str(layout_of(_experts.innermost(layer)))
    return f"{type(layer).__module__}.{type(layer).__qualname__} has no fused form"


def _around_experts(layer: Any) -> bool:
    return type(layer) is ParamWrapper and not isinstance(layout_of(_experts.innermost(layer)), str)
