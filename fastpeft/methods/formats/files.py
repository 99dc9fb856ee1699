"""Files of a checkpoint put in place as a whole: written beside it and renamed, so a reader never sees half a file."""

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor


def safetensors(op: str):
    """``safetensors.torch``, which comes with transformers and PEFT; imported when a file is touched."""
    try:
        import safetensors.torch
    except ImportError as error:
        message = f"{op}: safetensors does not import, it comes with transformers and PEFT (pip install safetensors)"
        raise ImportError(message) from error
    return safetensors.torch


def whole(tensor: Tensor) -> Tensor:
    """A copy of its own in memory, gathered if it is sharded: every process of a group calls this."""
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def refuse_meta(op: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise if a tensor has no values to write."""
    for key, tensor in tensors.items():
        if tensor.is_meta:
            raise ValueError(f"{op}: {key} is on the meta device, expected values")


def writes_here() -> bool:
    """Whether this process writes files: of a group, rank 0 alone."""
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized() and distributed.get_rank() != 0)


def write_tensors(op: str, path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file of tensors that are contiguous and share no memory."""
    library = safetensors(op)
    _write(path, lambda temporary: library.save_file(dict(tensors), temporary, metadata={"format": "pt"}))


def read_safetensors(op: str, path: Path) -> dict[str, Tensor]:
    """All tensors of a file.

    Raises:
        FileNotFoundError: there is none. ValueError: truncated, or no safetensors file.
    """
    library = safetensors(op)
    if not path.is_file():
        raise FileNotFoundError(f"{op}: {path.parent} has no {path.name}")
    try:
        return library.load_file(path)
    except Exception as error:  # SafetensorError is not public in every version
        raise ValueError(f"{op}: {path} is truncated or no safetensors file ({error})") from None


def read_safetensors_bytes(op: str, data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a file in memory, and its metadata.

    Raises:
        ValueError: truncated, or no safetensors file.
    """
    library = safetensors(op)
    try:
        tensors = library.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except Exception as error:  # SafetensorError is not public in every version
        raise ValueError(f"{op}: the bytes are truncated or no safetensors file ({error})") from None
    return tensors, header.get("__metadata__", {})


def write_pickled(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A file of ``torch.save`` with nothing but tensors, for libraries that look for one."""
    _write(path, lambda temporary: torch.save(dict(tensors), temporary))


def write_json(path: Path, fields: Mapping) -> None:
    """A JSON file, indented."""
    _write(path, lambda temporary: Path(temporary).write_text(json.dumps(fields, indent=2) + "\n", "utf-8"))


def _write(path: Path, write: Callable[[str], object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        write(temporary)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
