"""Files of a checkpoint put in place as a whole: written beside it and renamed, so a reader never sees half a file."""

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor


def safetensors(op: str):
    """``safetensors.torch``, which comes with transformers and PEFT; imported when a file is touched."""
    try:
        import safetensors.torch
    except ImportError as error:
        message = f"{op}: safetensors does not import, it comes with transformers and PEFT (pip install safetensors)"
        raise ImportError(message) from error
    return safetensors.torch


def write_tensors(op: str, path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file of tensors that are contiguous and share no memory."""
    library = safetensors(op)
    _write(path, lambda temporary: library.save_file(dict(tensors), temporary, metadata={"format": "pt"}))


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
