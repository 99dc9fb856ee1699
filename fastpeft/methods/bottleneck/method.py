"""Bottleneck adapters, as ``attach`` drives them: holders beside the model's modules, called by hooks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import nn

from ...nn.base_layer import trained_dtype
from ...nn.bottleneck import BottleneckAdapter
from ..attachment import attachment_of, state_of
from ..bypasses import restore_bypasses, stop_bypasses
from ..method import Method
from ..placement import check_values, device_beside
from .config import Bottleneck
from .files import BottleneckFiles, adapter_at
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
    name, config, title, record_type = "bottleneck", Bottleneck, "a bottleneck adapter", BottleneckRecord
    unmergeable = "it is not linear"

    def __init__(self):
        self.files = BottleneckFiles(self)

    def resolve(self, op: str, model: nn.Module, config: Bottleneck, name: str, strict: bool = True) -> Plan:
        found = sites(op, model, config)
        if attachment_of(model) is not None:
            _refuse_copies(op, model, found)
        if config.residual_before_norm == "post_add" and not config.parallel and config.original_norm_before:
            early = next((site for site in found if site.norm is None and site.place != "rule"), None)
            if early is not None:
                raise ValueError(
                    f"{op}: residual_before_norm='post_add' asks for a norm after the sub-block, which "
                    f"{early.path} has not"
                )
        for site in found:
            config.size_of(site.features, site.layer)
        check_values(op, model, [site.stream or site.norm or site.path for site in found])
        return config, found

    def apply(self, model: nn.Module, plan: Plan, name: str) -> None:
        config, found = plan
        holders = self.record(model).holders
        _refuse_copies("attach", model, found)
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


def _refuse_copies(op: str, model: nn.Module, found: list[Site]) -> None:
    inside = tuple(f"{path}." for path in state_of(model).copies)
    for site in found:
        for path in (site.path, site.stream, site.norm):
            if path is not None and path.startswith(inside or ("\0",)):
                raise ValueError(f"{op}: {path} is inside a module of modules_to_save, expected one or the other")


def _build(model: nn.Module, site: Site, config: Bottleneck) -> BottleneckAdapter:
    """On the device of the modules it stands beside."""
    module = model.get_submodule(site.stream or site.norm or site.path)
    device, dtype = device_beside(module, model)
    adapter = adapter_at(site, config, config.dtype or trained_dtype(dtype), device)
    return adapter.requires_grad_(False).train(model.get_submodule(site.path).training)
