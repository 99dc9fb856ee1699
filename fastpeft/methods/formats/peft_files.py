"""The two files of a PEFT checkpoint, read safely: safetensors and JSON only, nothing is ever unpickled.

safetensors comes with transformers and PEFT; it is imported when a file is touched.
"""

import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from .files import read_safetensors, safetensors, write_tensors

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
PICKLED = "adapter_model.bin"
_PICKLES = (".bin", ".pt", ".pth", ".pkl")


class Unserved(ValueError):
    """A checkpoint is whole, and what it holds is not computed here."""


def read_config(op: str, directory: Path) -> object:
    """What ``adapter_config.json`` holds.

    Raises:
        FileNotFoundError: there is none. ValueError: it is no JSON.
    """
    path = directory / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{op}: {directory} has no {CONFIG}")
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:  # also of the decoding
        raise ValueError(f"{op}: {path} is no JSON ({error})") from None


def read_tensors(op: str, directory: Path) -> dict[str, Tensor]:
    """The tensors of ``adapter_model.safetensors`` by their keys without PEFT's prefix.

    Raises:
        FileNotFoundError: there is none.
        ValueError: pickled, truncated, no safetensors file, or not one of PEFT's. ImportError: safetensors is missing.
    """
    safetensors(op)
    path = weights_of(op, directory)
    return without_prefix(op, path, read_safetensors(op, path))


def weights_of(op: str, directory: Path) -> Path:
    """Where the tensors are. A pickled file in their place is never opened.

    Raises:
        FileNotFoundError: nowhere. ValueError: in a pickled file.
    """
    path = directory / WEIGHTS
    if not path.is_file():
        pickled = [p.name for p in sorted(directory.glob("*")) if p.suffix in _PICKLES]
        if pickled:
            text = f"{directory} has {pickled[0]}, which would be unpickled, expected {WEIGHTS}"
            raise ValueError(f"{op}: {text}, which fastpeft convert writes")
        raise FileNotFoundError(f"{op}: {directory} has no {WEIGHTS}")
    return path


def without_prefix(op: str, source: object, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors by the names that the model's modules have; ``source`` is named in the error."""
    foreign = next((key for key in tensors if not str(key).startswith(PREFIX)), None)
    if foreign is not None or not tensors:
        raise ValueError(f"{op}: {source} has {foreign or 'no tensors'}, expected keys that start with {PREFIX}")
    return {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}


def of_model(key: str) -> str:
    """A key that says that the tensor is a parameter of the model itself (of its embedding or head)."""
    path, _, name = key.rpartition(".")
    return key if ".base_layer." in key else f"{path}.base_layer.{name}"


def add_tensors(op: str, directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """Put further tensors into a checkpoint of PEFT's that has been written."""
    path = directory / WEIGHTS
    write_tensors(op, path, {**read_safetensors(op, path), **tensors})


def warn_of_another_base(op: str, model: object, configs: Iterable[Mapping]) -> None:
    """Warn where a checkpoint's config and the model both name a base model, and not the same."""
    here = str(getattr(model, "name_or_path", None) or "").rstrip("/")
    for fields in configs:
        there = str(fields.get("base_model_name_or_path") or fields.get("model_name") or "").rstrip("/")
        if here and there and here != there:
            warnings.warn(f"{op}: the checkpoint is for {there}, the model is {here}", stacklevel=3)
            return
