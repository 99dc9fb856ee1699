"""Bottleneck adapters, as ``attach`` drives them: holders beside the model's modules, called by hooks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ...nn.base_layer import HALF
from ...nn.bottleneck import BottleneckAdapter
from ..attachment import attachment_of
from ..bypasses import restore_bypasses, stop_bypasses
from ..formats.adapterhub_files import read_hub_tensors, write_hub
from ..formats.adapterhub_format import from_hub, keys_from_hub, keys_to_hub, to_hub, why_not
from ..formats.files import read_safetensors, write_json, write_tensors
from ..formats.peft_files import CONFIG, WEIGHTS
from ..method import Method
from .config import Bottleneck
from .files import PEFT_TYPE, own_config, own_fields
from .holder import Bottlenecks, form_at
from .sites import Site, sites

Plan = tuple[Bottleneck, list[Site]]


@dataclass
class BottleneckRecord:
    """What was added to a model.

    Attributes:
        holders: in the order in which they were made.
        attributes: (path, attribute, value) that were set to keep PyTorch from computing past the hooks.
    """

    holders: list[Bottlenecks] = field(default_factory=list)
    attributes: list[tuple[str, str, object]] = field(default_factory=list)


class BottleneckMethod(Method):
    name, config, title = "bottleneck", Bottleneck, "a bottleneck adapter"
    unmergeable = "it is not linear"

    def new_record(self) -> BottleneckRecord:
        return BottleneckRecord()

    def resolve(self, op: str, model: nn.Module, config: Bottleneck, name: str, strict: bool = True) -> Plan:
        found = sites(op, model, config)
        if config.residual_before_norm == "post_add" and not config.parallel and config.original_norm_before:
            early = next((site for site in found if site.norm is None and site.place != "rule"), None)
            if early is not None:
                raise ValueError(
                    f"{op}: residual_before_norm='post_add' asks for a norm after the sub-block, which "
                    f"{early.path} has not"
                )
        for site in found:
            config.size_of(site.features, site.layer)
        return config, found

    def apply(self, model: nn.Module, plan: Plan, name: str) -> None:
        config, found = plan
        holders = self.record(model).holders
        _refuse_copies(model, found)
        built = []
        for site in found:
            kind, form = form_at(site, config)
            built.append((site, kind, form, _build(model, site, config)))
        for site, kind, form, adapter in built:
            holder = next((h for h in holders if h.site.path == site.path and h.kind == kind), None)
            if holder is None:
                holder = Bottlenecks(site, kind).train(adapter.training)
                holders.append(holder)
            holder.adapters[name], holder.forms[name] = adapter, form

    def lift(self, model: nn.Module) -> None:
        record = self.record(model)
        for holder in record.holders:
            holder.take_down(model)
        restore_bypasses(model, record.attributes)

    def settle(self, model: nn.Module) -> None:
        self.lift(model)
        record = self.record(model)
        for holder in record.holders:
            holder.put_up(model)
        stop_bypasses(model, record.attributes, lambda module: isinstance(module, Bottlenecks))

    def discard(self, model: nn.Module, name: str) -> None:
        holders = self.record(model).holders
        for holder in list(holders):
            if name in holder.adapters:
                del holder.adapters[name], holder.forms[name]
            if not len(holder.adapters):
                holders.remove(holder)

    def remove(self, model: nn.Module, keep_merged: bool = False) -> None:
        """``lift`` has done it."""

    def set_active(self, model: nn.Module, names: Sequence[str], trainable: bool = True) -> None:
        for holder in self.record(model).holders:
            holder.active = tuple(name for name in names if name in holder.adapters)
            for name, adapter in holder.adapters.items():
                adapter.requires_grad_(trainable and name in holder.active)

    def disable(self, model: nn.Module) -> Callable[[], None]:
        holders = [holder for holder in self.record(model).holders if not holder.disabled]

        def switch(disabled: bool) -> None:
            for holder in holders:
                holder.disabled = disabled

        switch(True)
        return lambda: switch(False)

    def parameters(self, model: nn.Module, name: str) -> dict[str, Tensor]:
        return {
            f"{holder.site.path}.{key}": parameter
            for holder in self.record(model).holders
            if name in holder.adapters
            for key, parameter in holder.adapters[name].named_parameters()
        }

    def expected(self, model: nn.Module, config: Bottleneck, plan: Plan) -> dict[str, tuple[int, ...]]:
        shapes = {}
        for site in plan[1]:
            with torch.device("meta"):
                adapter = _adapter(config, site)
            shapes.update((f"{site.path}.{key}", tuple(p.shape)) for key, p in adapter.named_parameters())
        return shapes

    def recognises(self, fields: Mapping) -> bool:
        return ("peft_type" not in fields and "config" in fields) or fields.get("peft_type") == PEFT_TYPE

    def read(self, op: str, model: nn.Module, directory: Path, fields: Mapping) -> tuple[Bottleneck, dict[str, Tensor]]:
        if fields.get("peft_type") == PEFT_TYPE:
            return own_config(op, fields), read_safetensors(op, directory / WEIGHTS)
        config = from_hub(op, fields)
        tensors = read_hub_tensors(op, directory)
        prefix = getattr(model, "base_model_prefix", "")
        return config, keys_from_hub(tensors, sites(op, model, config), prefix, fields.get("name"))

    def write(self, op: str, model: nn.Module, name: str, tensors: dict[str, Tensor], directory: Path) -> None:
        config = self.configs(model)[name]
        found = [holder.site for holder in self.record(model).holders if name in holder.adapters]
        if why_not(config, found) is None:
            write_hub(op, directory, keys_to_hub(tensors, found, name), to_hub(config, found, model, name))
        else:
            write_tensors(op, directory / WEIGHTS, tensors)
            write_json(directory / CONFIG, own_fields(config, [site.path for site in found]))


def _refuse_copies(model: nn.Module, found: list[Site]) -> None:
    state = attachment_of(model)
    inside = tuple(f"{path}." for path in state.copies)
    for site in found:
        for path in (site.path, site.stream, site.norm):
            if path is not None and path.startswith(inside or ("\0",)):
                raise ValueError(f"attach: {path} is inside a module of modules_to_save, expected one or the other")


def _build(model: nn.Module, site: Site, config: Bottleneck) -> BottleneckAdapter:
    """On the device of the modules it stands beside."""
    module = model.get_submodule(site.stream or site.norm or site.path)
    near = next((p for p in module.parameters() if p.is_floating_point()), None)
    if near is None:
        near = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    dtype = config.dtype or (torch.float32 if near.dtype in HALF else near.dtype)
    adapter = _adapter(config, site, dtype=dtype, device=near.device)
    return adapter.requires_grad_(False).train(model.get_submodule(site.path).training)


def _adapter(config: Bottleneck, site: Site, **where) -> BottleneckAdapter:
    return BottleneckAdapter(
        site.features,
        config.size_of(site.features, site.layer),
        activation=config.activation,
        scale=config.scale,
        norm=config.norm,
        norm_after=config.norm_after,
        residual_first=config.residual_first,
        parallel=config.parallel,
        dropout=config.dropout,
        stochastic_depth=config.stochastic_depth,
        gating=config.gating,
        init=config.init,
        **where,
    )
