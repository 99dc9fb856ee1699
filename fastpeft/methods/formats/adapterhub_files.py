"""The files of an AdapterHub checkpoint, read without ever unpickling objects."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .files import read_safetensors, write_json, write_pickled, write_tensors
from .peft_files import CONFIG

SAFE_WEIGHTS, PICKLED_WEIGHTS = "adapter.safetensors", "pytorch_adapter.bin"


def read_hub_tensors(op: str, directory: Path) -> dict[str, Tensor]:
    """The tensors of ``adapter.safetensors`` or, where there is none, of ``pytorch_adapter.bin``.

    Raises:
        FileNotFoundError: neither is there.
        ValueError: truncated, foreign, or holding anything but tensors.
    """
    path = directory / PICKLED_WEIGHTS
    if (directory / SAFE_WEIGHTS).is_file() or not path.is_file():
        if not (directory / SAFE_WEIGHTS).is_file():
            raise FileNotFoundError(f"{op}: {directory} has neither {SAFE_WEIGHTS} nor {PICKLED_WEIGHTS}")
        return read_safetensors(op, directory / SAFE_WEIGHTS)
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of zipfile, pickle and torch, by what is wrong
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{op}: {path} is truncated or holds more than tensors ({reason})") from None
    if not isinstance(tensors, dict) or not tensors or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ValueError(f"{op}: {path} holds {type(tensors).__name__}, expected a dict of tensors")
    return dict(tensors)


def write_hub(op: str, directory: Path, tensors: Mapping[str, Tensor], fields: Mapping) -> None:
    """Both files of weights: AdapterHub's library looks for the pickled one unless told ``use_safetensors=True``."""
    write_tensors(op, directory / SAFE_WEIGHTS, tensors)
    write_pickled(directory / PICKLED_WEIGHTS, tensors)
    write_json(directory / CONFIG, fields)
