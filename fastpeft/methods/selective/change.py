"""A plan carried out on a model, and taken back: every value, module and flag bit for bit."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ...nn.base_layer import is_conv1d
from ...nn.live_slice import LiveSlice
from ...nn.row_sparse import RowSparseLinear
from ...nn.token_rows import TokenRows
from ..attachment import replace_module
from .plan import Plan, Slice, original_at, own_modules, own_parameters

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
          "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called")  # fmt: skip


class Change:
    """What one plan trains on one model.

    While it acts, what it trains is in the model: whole parameters are the model's own, trained in place, and sliced
    layers stand at their paths. While it does not, the model has the values it had, and the trained ones are kept here.
    Copies of whole parameters are kept in the CPU's memory.
    """

    def __init__(self, model: nn.Module, plan: Plan):
        self.plan, self.active = plan, False
        parameters, modules = own_parameters(model), own_modules(model)
        self.originals = {name: _cpu(parameters[name]) for name in plan.whole}
        self.trained: dict[str, Tensor] = dict(self.originals)  # by name; not used while this acts
        self.biases = {path: _zero_bias(original_at(model, path)) for path in plan.biases}
        self.layers: dict[str, LiveSlice] = {}
        self.rows: dict[str, Tensor] = {}
        for part in plan.slices:
            for path, layer in _slice_layers(modules, part):
                for place in _places(model, modules[path]) or [path]:
                    self.layers[place] = layer.requires_grad_(False)
            self.rows[part.path] = self._own_rows(part)

    def parameters(self, model: nn.Module) -> dict[str, Tensor]:
        """What is trained, by key: parameters while this acts, else plain tensors for whole parameters."""
        own = own_parameters(model) if self.active else self.trained
        return {
            **{name: own[name] for name in self.plan.whole},
            **{f"{path}.bias": bias for path, bias in self.biases.items()},
            **{part.key: self.layers[part.path].trained for part in self.plan.slices},
        }

    @torch.no_grad()
    def enter(self, model: nn.Module) -> None:
        """Put what is trained into the model."""
        own = own_parameters(model)
        for name, value in self.trained.items():
            own[name].copy_(value)
        for path, bias in self.biases.items():
            linear = original_at(model, path)
            bias.data = bias.data.to(linear.weight.device, linear.weight.dtype)
            linear.bias = bias
        for path, layer in self.layers.items():
            weight = layer.stored
            layer._parameters["bias"] = getattr(layer.base_layer, "bias", None)  # perhaps just added
            layer.trained.data, layer.index = layer.trained.data.to(weight.device), layer.index.to(weight.device)
            replace_module(model, path, layer.train(layer.base_layer.training))
            layer._stale = True
            layer.write()
        self.active, self.trained = True, {}

    @torch.no_grad()
    def leave(self, model: nn.Module) -> None:
        """Give the model its values back; keep the trained ones."""
        own = own_parameters(model)
        self.trained = {name: _cpu(own[name]) for name in self.plan.whole}
        for name, value in self.originals.items():
            own[name].copy_(value)
            own[name].grad = None
        for path in self.biases:
            original_at(model, path).bias = None
        for part in self.plan.slices:
            layer = self.layers[part.path]
            weight = layer._matrix(layer.stored)
            weight.index_copy_(int(layer.columns), layer.index, self.rows[part.path].to(weight.device, weight.dtype))
        for path, layer in self.layers.items():
            replace_module(model, path, layer.base_layer.train(layer.training))
        self.active = False

    def train(self, model: nn.Module, trainable: bool) -> None:
        """Ask for gradients, or not."""
        for tensor in self.parameters(model).values():
            if isinstance(tensor, nn.Parameter):
                tensor.requires_grad_(trainable)

    def weights(self) -> Iterable[str]:
        """Names that tell whether two changes touch the same weight."""
        return {*self.plan.whole, *(f"{path}.bias" for path in self.biases), *(f"{p}.weight" for p in self.layers)}

    def _own_rows(self, part: Slice) -> Tensor:
        layer = self.layers[part.path]
        matrix = layer._matrix(layer.stored.detach())
        return matrix.index_select(int(layer.columns), layer.index)


def _slice_layers(modules: dict[str, nn.Module], part: Slice):
    base = modules[part.path]
    if part.kind == "tokens":
        layer = _token_rows(base, part.index)
        yield part.path, layer
        for path in part.tied:
            if isinstance(modules[path], nn.Embedding):
                yield path, _token_rows(modules[path], part.index, layer.trained)
            else:
                yield path, RowSparseLinear(modules[path], rows=part.index, trained=layer.trained)
    else:
        chosen: dict[str, Any] = {part.kind: part.index}
        yield part.path, RowSparseLinear(base, **chosen)


def _places(model: nn.Module, module: nn.Module) -> list[str]:
    """Every path of a module, which may be a child of several (T5's embedding in older transformers)."""
    return [path for path, found in model.named_modules(remove_duplicate=False) if found is module]


def _token_rows(base: nn.Module, index: Tensor, trained: nn.Parameter | None = None) -> TokenRows:
    layer = TokenRows(base, index, trained=trained)
    for name in _HOOKS:  # an embedding's hooks go on working
        if name in base.__dict__:
            layer.__dict__[name] = base.__dict__[name]
    return layer


def _zero_bias(linear: Any) -> nn.Parameter:
    weight = linear.weight
    size = weight.shape[1] if is_conv1d(linear) else weight.shape[0]
    return nn.Parameter(weight.new_zeros(size), requires_grad=False)


def _cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
