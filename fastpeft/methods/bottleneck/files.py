"""Our own config file of bottleneck adapters, for those that AdapterHub's format has no words for."""

from collections.abc import Mapping, Sequence
from dataclasses import fields

import torch

from .config import Bottleneck

PEFT_TYPE = "FASTPEFT_BOTTLENECK"


def own_fields(config: Bottleneck, paths: Sequence[str]) -> dict:
    """Every field of the config that JSON can hold; a function as targets becomes the paths that it meant."""
    found = {field.name: getattr(config, field.name) for field in fields(config)}
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
