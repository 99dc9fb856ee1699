"""The two files of a PEFT checkpoint, read safely: safetensors and JSON only, nothing is ever unpickled.

safetensors comes with transformers and PEFT; it is imported when a file is touched.
"""

import json
from pathlib import Path

from torch import Tensor

from .files import read_safetensors, safetensors

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
_PICKLES = (".bin", ".pt", ".pth", ".pkl")


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
            raise ValueError(f"{op}: {directory} has {pickled[0]}, which would be unpickled, expected {WEIGHTS}")
        raise FileNotFoundError(f"{op}: {directory} has no {WEIGHTS}")
    return path


def without_prefix(op: str, source: object, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors by the names that the model's modules have; ``source`` is named in the error."""
    foreign = next((key for key in tensors if not str(key).startswith(PREFIX)), None)
    if foreign is not None or not tensors:
        raise ValueError(f"{op}: {source} has {foreign or 'no tensors'}, expected keys that start with {PREFIX}")
    return {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
