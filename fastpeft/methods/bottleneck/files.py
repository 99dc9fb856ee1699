"""Bottleneck adapters on disk: AdapterHub's files, and our own config for those that its format has no words for."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor, nn

from ...nn.bottleneck import BottleneckAdapter
from ..formats.adapterhub_files import read_hub_tensors, write_hub
from ..formats.adapterhub_format import from_hub, keys_from_hub, keys_to_hub, to_hub, why_not
from ..formats.files import read_safetensors, write_json, write_tensors
from ..formats.peft_files import CONFIG, WEIGHTS
from ..method import Files
from .config import Bottleneck
from .sites import Site, sites

PEFT_TYPE = "FASTPEFT_BOTTLENECK"
# Fields that are the adapter's own, and not about where it goes.
_OF_ADAPTERS = {
    *("activation", "scale", "norm", "norm_after", "residual_first", "parallel", "gating", "dropout"),
    *("stochastic_depth", "init"),
}


class BottleneckFiles(Files):
    """AdapterHub's, else FASTPEFT_BOTTLENECK."""

    def parameters(self, model: nn.Module, name: str) -> dict[str, Tensor]:
        return {
            f"{holder.site.path}.{key}": parameter
            for holder in self.method.record(model).holders
            if name in holder.adapters
            for key, parameter in holder.adapters[name].named_parameters()
        }

    def expected(
        self, model: nn.Module, config: Bottleneck, plan: tuple[Bottleneck, list[Site]]
    ) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for site in plan[1]:
            with torch.device("meta"):
                adapter = adapter_at(site, config)
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
        config = self.method.configs(model)[name]
        found = [holder.site for holder in self.method.record(model).holders if name in holder.adapters]
        if why_not(config, found) is None:
            write_hub(op, directory, keys_to_hub(tensors, found, name), to_hub(config, found, model, name))
        else:
            write_tensors(op, directory / WEIGHTS, tensors)
            write_json(directory / CONFIG, own_fields(config, [site.path for site in found]))


def adapter_at(
    site: Site, config: Bottleneck, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> BottleneckAdapter:
    """A new adapter of this config for a site."""
    settings = {name: value for name, value in config.as_dict().items() if name in _OF_ADAPTERS}
    size = config.size_of(site.features, site.layer)
    return BottleneckAdapter(site.features, size, **settings, dtype=dtype, device=device)


def own_fields(config: Bottleneck, paths: Sequence[str]) -> dict:
    """Every field of the config that JSON can hold; a function as targets becomes the paths that it meant."""
    found = config.as_dict()
    if config.targets is not None:
        found["targets"] = list(paths)
    found["dtype"] = None if config.dtype is None else str(config.dtype).removeprefix("torch.")
    if isinstance(config.reduction_factor, Mapping):
        found["reduction_factor"] = {str(key): value for key, value in config.reduction_factor.items()}
    return {"peft_type": PEFT_TYPE, **found}


def own_config(op: str, given: Mapping) -> Bottleneck:
    """The config that these fields describe.

    Raises:
        ValueError: a field that no config has, or a value that it may not have.
    """
    settings = {name: value for name, value in given.items() if name != "peft_type"}
    unknown = settings.keys() - {field.name for field in fields(Bottleneck)}
    if unknown:
        raise ValueError(
            f"{op}: adapter_config.json has {min(unknown)}={settings[min(unknown)]!r}, which is not served"
        )
    if settings.get("dtype") is not None:
        settings["dtype"] = getattr(torch, str(settings["dtype"]), settings["dtype"])
    try:
        return Bottleneck(**settings)
    except TypeError as error:
        raise ValueError(f"{op}: adapter_config.json: {error}") from None
