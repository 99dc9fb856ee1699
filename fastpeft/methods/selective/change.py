"""A plan carried out on a model, and taken back: every value, module and flag bit for bit."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from ..._check import PLAIN
from ...nn.base_layer import is_conv1d
from ...nn.live_slice import LiveSlice
from ...nn.row_sparse import RowSparseLinear
from ...nn.token_rows import TokenRows
from ..own import innermost, own_at, own_modules, own_parameters, paths_of, place_of
from .plan import Plan, Slice

# What a layer and the one that it stands for have in common: hooks, and modules that were added for hooks.
_SHARED = ("_modules", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
           "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called")  # fmt: skip


class Change:
    """What one plan trains on one model. It is made while nothing else acts in place (``originals``).

    While it is in the model, whole parameters are the model's own, trained in place, and sliced layers stand where the
    model's own stood. While it is not, the model has the values it had, and the trained ones are kept here. Copies of
    whole parameters are kept in the CPU's memory.
    """

    def __init__(self, model: nn.Module, plan: Plan):
        self.plan, self.active = plan, False
        parameters, modules = own_parameters(model), own_modules(model)
        self.originals = {name: _cpu(parameters[name]) for name in plan.whole}
        self.trained = {name: value.clone() for name, value in self.originals.items()}  # not used while it is in
        self.biases = {path: _zero_bias(modules[path]) for path in plan.biases}
        self.layers: dict[str, LiveSlice] = {}
        self.rows: dict[str, Tensor] = {}
        self._before: tuple[Any, list[int]] | None = None
        for part in plan.slices:
            for path, layer in _slice_layers(modules, part):
                for place in paths_of(model, modules[path]):
                    self.layers[place] = layer.requires_grad_(False)
            self.rows[part.path] = self._own_rows(part)

    def parameters(self, model: nn.Module) -> dict[str, Tensor]:
        """What is trained, by key: parameters while this is in the model, else plain tensors for whole parameters."""
        own = own_parameters(model) if self.active else self.trained
        biases = {path: own_at(model, path).bias for path in self.biases} if self.active else self.biases
        return {
            **{name: own[name] for name in self.plan.whole},
            **{f"{path}.bias": bias for path, bias in biases.items()},
            **{part.key: self.layers[part.path].trained for part in self.plan.slices},
        }

    @torch.no_grad()
    def enter(self, model: nn.Module, again: bool = False) -> None:
        """Put what is trained into the model.

        Args:
            model: the model.
            again: whether it was taken out for a while only, and nothing else was in since. Then the parameters'
                version counters are set back too, so that a backward of before can go on.
        """
        own = own_parameters(model)
        for name, value in self.trained.items():
            _put(own[name], value)
        for path, bias in self.biases.items():
            weight = own_at(model, path).weight
            bias.data = bias.data.to(weight.device, weight.dtype)
            _set_bias(model, path, bias)
        for path, layer in self.layers.items():
            parent, name = place_of(model, path)
            layer.stand_for(parent._modules[name])
            setattr(parent, name, layer)
            layer.write()
        if again and self._before is not None and self._before[1] == self._versions():
            self._before[0].__exit__()
        self.active, self.trained, self._before = True, {}, None

    @torch.no_grad()
    def leave(self, model: nn.Module, for_a_while: bool = False) -> None:
        """Give the model its values back; keep the trained ones.

        Args:
            model: the model.
            for_a_while: whether ``enter`` may be told that it comes in again.
        """
        own = own_parameters(model)
        for layer in self.layers.values():
            layer.write()
        weights = [*(own[name] for name in self.plan.whole), *(layer.stored for layer in self.layers.values())]
        counters = _unsafe_preserve_version_counter(
            tuple(t for t in weights if type(t) in PLAIN and not t.is_inference())
        )
        self.trained = {name: _cpu(own[name]) for name in self.plan.whole}
        for name, value in self.originals.items():
            _put(own[name], value)
        for part in self.plan.slices:
            layer = self.layers[part.path]
            _put_rows(layer, self.rows[part.path])
        for path, layer in self.layers.items():
            parent, name = place_of(model, path)
            setattr(parent, name, layer.give_back())
        for path in self.biases:
            self.biases[path] = own_at(model, path).bias
            _set_bias(model, path, None)
        self.active, self._before = False, (counters, self._versions()) if for_a_while else None

    def train(self, model: nn.Module, trainable: bool) -> None:
        """Ask for gradients, or not."""
        for parameter in self._trained_in(model):
            parameter.requires_grad_(trainable)

    def rest(self, model: nn.Module) -> None:
        """No longer train; whole parameters, which others may train next, keep no gradient."""
        self.train(model, False)
        own = own_parameters(model)
        for name in self.plan.whole:
            own[name].grad = None

    def _trained_in(self, model: nn.Module) -> Iterator[nn.Parameter]:
        own = own_parameters(model)
        yield from (own[name] for name in self.plan.whole)
        for path, bias in self.biases.items():
            yield own_at(model, path).bias if self.active else bias
        yield from (self.layers[part.path].trained for part in self.plan.slices)

    def _versions(self) -> list[int]:
        """Counters of what is kept here, which rise when somebody else changes it."""
        slices = [self.layers[part.path].trained for part in self.plan.slices]
        return [t._version for t in (*self.trained.values(), *slices) if not t.is_inference()]

    def _own_rows(self, part: Slice) -> Tensor:
        layer = self.layers[part.path]
        matrix = layer._matrix(layer.stored.detach())
        return matrix.index_select(int(layer.columns), layer.index)


def _slice_layers(modules: dict[str, nn.Module], part: Slice) -> Iterator[tuple[str, LiveSlice]]:
    base = modules[part.path]
    if part.kind == "tokens":
        layer: LiveSlice = TokenRows(base, part.index)
    else:
        chosen: dict[str, Any] = {part.kind: part.index}
        layer = RowSparseLinear(base, **chosen)
    layers = {part.path: layer}
    for path in part.tied:
        if isinstance(modules[path], nn.Embedding):
            layers[path] = TokenRows(modules[path], part.index, trained=layer.trained)
        else:
            layers[path] = RowSparseLinear(modules[path], rows=part.index, trained=layer.trained)
    for path, layer in layers.items():
        layer.__dict__.update({name: modules[path].__dict__[name] for name in _SHARED})
        yield path, layer


def _put(parameter: Tensor, value: Tensor) -> None:
    """The value into the parameter; of a vocabulary that has been resized since, the rows that both have."""
    if parameter.shape != value.shape and parameter.shape[1:] == value.shape[1:]:
        rows = min(len(parameter), len(value))
        parameter, value = parameter[:rows], value[:rows]
    parameter.copy_(value)


def _put_rows(layer: LiveSlice, values: Tensor) -> None:
    weight = layer._matrix(layer.stored)
    weight.index_copy_(int(layer.columns), layer.index, values.to(weight.device, weight.dtype))


def _set_bias(model: nn.Module, path: str, bias: nn.Parameter | None) -> None:
    """Also where rows of the layer are trained, by this change or another."""
    parent, name = place_of(model, path)
    standing = parent._modules[name]
    innermost(standing).bias = bias
    standing._parameters["bias"] = bias


def _zero_bias(linear: Any) -> nn.Parameter:
    weight = linear.weight
    size = weight.shape[1] if is_conv1d(linear) else weight.shape[0]
    return nn.Parameter(weight.new_zeros(size), requires_grad=False)


def _cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
