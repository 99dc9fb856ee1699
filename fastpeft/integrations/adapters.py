"""Bottleneck adapters of AdapterHub's library ``adapters`` served by the fused op: the same modules, another forward.

    model = fastpeft.accelerate(model)       # after adapters.init(model) and model.add_adapter(...)

Only the class of each adapter changes, on the instance: parameters, names, saving, composition and the library's own
placement of residuals and norms stay as they are. What the op does not serve (Compacter's layers, AdapterFusion, which
needs every adapter's projection, stochastic depth in training, activations without a kernel) runs the library's own
forward; ``fastpeft.report(model)`` says which layers, and why. Adapters that are added later need another call.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..nn.backend import serving_backend
from ..nn.bottleneck import BottleneckAdapter
from . import _fusable
from ._layers import layers_of, refuse_unfused

try:
    import adapters
    from adapters.methods.invertible import GLOWCouplingBlock, NICECouplingBlock
    from adapters.methods.modeling import Adapter, BertFusion, ParallelAdapter
except ImportError as error:
    raise ImportError(
        "fastpeft.integrations.adapters: adapters does not import, expected adapters>=1.0 (pip install adapters)"
    ) from error

# What transformers builds for each name, by class; the library wraps it.
_ACTIVATIONS = {
    "ReLU": "relu",
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "Tanh": "tanh",
    "LinearActivation": "identity",
    "Identity": "identity",
}


# For checkers: the fields and the forward that both kinds inherit are the library's.
_Base: Any = object


class _Fused(_Base):
    """The forward of both kinds. ``fastpeft_fusion``: the holder's AdapterFusion layers, in a tuple so that they do not
    become a child."""

    fastpeft_kind = BottleneckAdapter.fastpeft_kind

    def forward(self, x: Tensor, residual_input: Tensor, output_gating: bool = False):
        if output_gating or plan(self, x) is not None:
            return super().forward(x, residual_input, output_gating=output_gating)
        parallel = isinstance(self, ParallelAdapter)
        residual = None if parallel else residual_input
        if residual is not None and residual.shape != x.shape:
            return super().forward(x, residual_input)
        after, gated = self.add_layer_norm_after, self.use_gating
        alone = gated or (after and not self.adapter_residual_before_ln)
        y = _run(self, x, None if alone else residual)
        if gated:
            y = y * torch.sigmoid(self.gate(x)).mean(1, keepdim=True).to(y.dtype)
        if alone and residual is not None and (self.adapter_residual_before_ln or not after):
            y = y + residual
        if after:
            y = self.adapter_norm_after(y)
            if not self.adapter_residual_before_ln and residual is not None:
                y = y + residual
        # The hidden units, which nobody reads, and the projection, which AdapterFusion alone reads.
        return y, None, None

    def fastpeft_report(self) -> str:
        """``"fused"``, or why not, or what runs in plain PyTorch after the fused op."""
        reason = plan(self)
        if reason is not None:
            return reason
        parts = {"its gate": self.use_gating, "its norm after": self.add_layer_norm_after}
        found = [part for part, there in parts.items() if there]
        return f"{' and '.join(found)} in plain PyTorch after the fused op" if found else "fused"

    def fastpeft_backend(self) -> str:
        """The backend for an x of one row."""
        found = _layers(self)
        if isinstance(found, str):
            return found
        down = found[1]
        return serving_backend("bottleneck", down.weight.new_empty(1, down.in_features), down.weight)


class FastAdapter(_Fused, Adapter):
    """The library's sequential adapter."""

    def _get_name(self):
        return "Adapter"


class FastParallelAdapter(_Fused, ParallelAdapter):
    """The library's parallel adapter."""

    def _get_name(self):
        return "ParallelAdapter"


_FAST = {Adapter: FastAdapter, ParallelAdapter: FastParallelAdapter}
_WITHOUT_FORM = (BertFusion, NICECouplingBlock, GLOWCouplingBlock)
_SLOW = {fast: slow for slow, fast in _FAST.items()}


def accelerate(model: nn.Module, strict: bool = False) -> nn.Module:
    """Serve the bottleneck adapters of a model of ``adapters`` by the fused op: ``fastpeft.accelerate`` for them alone.

    Args:
        model: after ``adapters.init``, or any module with such adapters inside.
        strict: raise if any adapter, AdapterFusion or invertible adapter would keep the library's own forward.
    """
    layers, fusions = _adapters("accelerate", model), _fusions(model)
    if strict:
        reasons = {path: plan(layer, fusion=fusions.get(path)) for path, layer in layers.items()}
        reasons |= unfused(model)
        refuse_unfused(reasons, "adapter layers")
    for path, layer in layers.items():
        if type(layer) in _FAST:
            layer.__class__ = _FAST[type(layer)]
        layer.__dict__["fastpeft_fusion"] = (fusions[path],) if path in fusions else ()
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undo ``accelerate``, as ``fastpeft.restore`` does.

    Args:
        model: as ``accelerate`` was given.
    """
    for layer in _adapters("restore", model).values():
        layer.__class__ = _SLOW.get(type(layer), type(layer))
        layer.__dict__.pop("fastpeft_fusion", None)
    return model


def unfused(model: nn.Module) -> dict[str, str]:
    """Path and reason of every part of the library that has no fused form."""
    return {path: _no_form(m) for path, m in model.named_modules() if isinstance(m, _WITHOUT_FORM)}


def describe(module: nn.Module) -> tuple[str, str] | None:
    """(kind, why it is not fused) of a part that ``accelerate`` has not been called on; None for any other module."""
    if isinstance(module, _WITHOUT_FORM):
        return _Fused.fastpeft_kind, _no_form(module)
    if type(module) not in _FAST:
        return None
    name = type(module).__name__
    why = f"{name} is the adapters library's own layer; fastpeft.accelerate has not been called on it"
    return _Fused.fastpeft_kind, why


def _no_form(module: nn.Module) -> str:
    return f"{type(module).__name__} has no fused form"


def plan(layer: Adapter, x: Tensor | None = None, fusion: nn.ModuleDict | None = None) -> str | None:
    """Why the library's own forward serves this layer, or None.

    Args:
        x: the input; None stands for any plain tensor of the weights' dtype and device.
        fusion: the holder's AdapterFusion layers, where the layer does not know them yet.
    """
    if len(fusion if fusion is not None else next(iter(layer.__dict__.get("fastpeft_fusion", ())), ())):
        return "AdapterFusion reads its projection"
    found = _layers(layer)
    if isinstance(found, str):
        return found
    norm, down, activation = found
    if activation is None:
        return f"activation {type(layer.non_linearity.f).__name__} has no fused form"
    if hasattr(layer, "DropPath") and layer.training and not isinstance(layer, ParallelAdapter):
        return "stochastic depth in training"
    drop = layer.dropout
    if type(drop) is not nn.Dropout or drop.p >= 1.0 or drop.inplace:
        return f"its dropout is {drop}"
    inner = [down, layer.adapter_up, drop, layer.adapter_down, layer.non_linearity, *([norm] if norm else [])]
    if any(_fusable._intercepted(module) for module in inner):
        return "it has hooks or a replaced forward on its inner modules"
    weights = [p for module in (down, layer.adapter_up, norm) if module for p in module.parameters()]
    x = down.weight if x is None else x
    for tensor in (x, *weights):
        if type(tensor) not in _fusable.PLAIN:
            return f"a tensor is {type(tensor).__name__}, not a plain tensor"
        if tensor.layout is not torch.strided or tensor.is_nested:
            return "a tensor is sparse or nested"
        if tensor.device != x.device or x.device.type not in _fusable._DEVICES:
            return f"device {tensor.device} beside {x.device}"
        if tensor.dtype not in _fusable._FLOATS or (tensor is not x and tensor.dtype != down.weight.dtype):
            return f"dtype {tensor.dtype} beside {down.weight.dtype}"
    autocast = torch.is_autocast_enabled(x.device.type)
    if x.dtype != down.weight.dtype and not (autocast and torch.float64 not in (x.dtype, down.weight.dtype)):
        return f"the input is {x.dtype}, the adapter {down.weight.dtype}"
    return _fusable._transformed()


def _layers(layer: Adapter) -> tuple[nn.LayerNorm | None, nn.Linear, str | None] | str:
    """The norm before, the projection down and the activation's name; or what they are instead."""
    *before, down, _ = layer.adapter_down
    if type(down) is not nn.Linear or type(layer.adapter_up) is not nn.Linear:
        return f"its projections are {type(down).__name__} and {type(layer.adapter_up).__name__} (Compacter)"
    norm = before[0] if before else None
    if norm is not None and (type(norm) is not nn.LayerNorm or norm.weight is None):
        return f"its norm is {type(norm).__name__}"
    function = layer.non_linearity.f
    name = "leaky_relu" if function is F.leaky_relu else _ACTIVATIONS.get(type(function).__name__)
    return norm, down, name


def _run(layer: Adapter, x: Tensor, residual: Tensor | None) -> Tensor:
    found = _layers(layer)
    if isinstance(found, str):
        raise RuntimeError(f"accelerate: an adapter has changed since it was asked: {found}")
    norm, down, activation = found
    if activation is None:
        raise RuntimeError("accelerate: an adapter's activation has changed since it was asked")
    up, drop = layer.adapter_up, layer.dropout
    return ops.bottleneck(
        x, down.weight, down.bias, up.weight, up.bias, residual, activation, layer.scaling,
        None if norm is None else norm.weight, None if norm is None else norm.bias, "layer",
        1e-5 if norm is None else norm.eps, drop.p if drop.training else 0.0,
    )  # fmt: skip


def _adapters(op: str, model: nn.Module) -> dict[str, Any]:
    expected = f"no bottleneck adapter of the adapters library {adapters.__version__}"
    return layers_of(op, model, Adapter, expected)


def _fusions(model: nn.Module) -> dict[str, nn.ModuleDict]:
    """For each adapter's path the AdapterFusion layers beside it."""
    found: dict[str, nn.ModuleDict] = {}
    for path, module in model.named_modules():
        fusion, inner = getattr(module, "adapter_fusion_layer", None), getattr(module, "adapters", None)
        if isinstance(fusion, nn.ModuleDict) and isinstance(inner, nn.ModuleDict):
            found.update((f"{path}.adapters.{name}" if path else f"adapters.{name}", fusion) for name in inner)
    return found
