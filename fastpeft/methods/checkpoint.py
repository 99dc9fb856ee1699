"""Adapters on disk, each in the format of the library that most use for its method: ``save`` and ``load``.

Which files, the method says (``Method.read`` and ``write``): LoRA's are PEFT's, bottleneck adapters' AdapterHub's. An
adapter of several methods is a folder with one checkpoint in a sub-folder for each.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .attach import apply_all, resolve_all, take_back
from .attachment import Attachment, attachment_of, holder_of
from .formats.files import safetensors
from .formats.peft_files import CONFIG, read_config
from .method import Method
from .registry import METHODS, method_named, method_of
from .selective.files import add_to_lora, is_input_tokens, tokens_beside_lora
from .switch import refuse_merged


def adapter_state_dict(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """The parameters of one adapter, by their names in its checkpoints; the tensors are the model's own."""
    holder, state = holder_of("adapter_state_dict", model)
    tensors = {}
    for method in _methods("adapter_state_dict", state, name):
        found = method.parameters(holder, name)
        tensors.update((method.checkpoint_key(key), tensor.detach()) for key, tensor in found.items())
    return tensors


def save(model: nn.Module, directory: str | os.PathLike, name: str = "default") -> None:
    """Write one adapter: LoRA, prompts and prefixes as PEFT would, bottleneck adapters as ``adapters`` would.

    An adapter of several methods gets a sub-folder for each. Sharded parameters are gathered, so with FSDP2 every
    process calls this; in a process group rank 0 alone writes.

    Raises:
        ValueError: no such adapter, merged, or parameters without values (meta); nothing has been written then.
        ImportError: safetensors is missing.
    """
    safetensors("save")
    holder, state = holder_of("save", model)
    methods = _methods("save", state, name)
    refuse_merged("save", holder, state)
    parts = [
        (method, {key: _whole(tensor) for key, tensor in method.parameters(holder, name).items()}) for method in methods
    ]
    for method, tensors in parts:
        for key, tensor in tensors.items():
            if tensor.is_meta:
                raise ValueError(f"save: {method.checkpoint_key(key)} is on the meta device, expected values")
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        return
    directory = Path(directory)
    if {method.name for method, _ in parts} == {"lora", "selective"}:
        (lora, tensors), (selective, rows) = sorted(parts, key=lambda part: part[0].name)
        if is_input_tokens(holder, selective.plan(holder, name)):  # PEFT keeps these two in one checkpoint
            lora.write("save", holder, name, tensors, directory)
            return add_to_lora("save", holder, selective.plan(holder, name), rows, directory)
    for method, tensors in parts:
        method.write("save", holder, name, tensors, directory / method.name if len(parts) > 1 else directory)


def load(model: nn.Module, directory: str | os.PathLike, name: str = "default") -> nn.Module:
    """Read what ``save``, PEFT or ``adapters`` wrote: into the adapter ``name`` if there is one, else into a new one.

    A new adapter is attached as the checkpoint's config says; the first of a model is active. Values are converted to
    the parameters' dtype.

    Returns:
        The same model.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a pickled, truncated or foreign file, a config that is not served, or a checkpoint for another
            model, with the keys and shapes that differ; nothing has been changed then.
        ImportError: safetensors is missing.
    """
    safetensors("load")
    attached = isinstance(model, nn.Module) and any(attachment_of(module) is not None for module in model.modules())
    holder, state = holder_of("load", model) if attached else (model, None)
    read = [
        (folder, method, *method.read("load", holder, folder, fields)) for folder, method, fields in _parts(directory)
    ]
    new = state is None or name not in state.configs
    if new:
        configs = tuple(config for _, _, config, _ in read)
        plans = resolve_all("load", holder, configs, name, strict=False)
        expected = [method.expected(holder, config, plan) for (_, method, config, _), (_, plan) in zip(read, plans)]
    else:
        refuse_merged("load", holder, state)
        _same_methods(state, name, [method for _, method, _, _ in read])
        expected = [_shapes(method.parameters(holder, name)) for _, method, _, _ in read]
    for (folder, method, _, tensors), shapes in zip(read, expected, strict=True):
        if shapes is not None:
            _compare(folder, method, tensors, shapes)
    if new:
        flags = [(parameter, parameter.requires_grad) for parameter in holder.parameters()]
        apply_all(holder, configs, name, plans)
        try:
            for (folder, method, _, tensors), shapes in zip(read, expected, strict=True):
                if shapes is None:
                    _compare(folder, method, tensors, _shapes(method.parameters(holder, name)))
        except ValueError:
            take_back(holder, name, flags)
            raise
    with torch.no_grad():
        for _, method, _, tensors in read:
            for key, destination in method.parameters(holder, name).items():
                destination.copy_(tensors[key])
    return model


def _parts(directory: str | os.PathLike) -> list[tuple[Path, Method, Mapping[str, Any]]]:
    """(folder, method, fields of its config) of each checkpoint in the directory: itself, or its methods' folders."""
    directory = Path(directory)
    folders = [directory / method.name for method in METHODS]
    folders = [folder for folder in folders if (folder / CONFIG).is_file()]
    if (directory / CONFIG).is_file() or not folders:
        folders = [directory]
    found = []
    for folder in folders:
        fields = read_config("load", folder)
        method = next((m for m in METHODS if isinstance(fields, dict) and m.recognises(fields)), METHODS[0])
        tokens = tokens_beside_lora(fields)
        found.append((folder, method, fields if tokens is None else {**fields, "trainable_token_indices": None}))
        if tokens is not None:
            found.append((folder, method_named("selective"), tokens))
    return found


def _compare(directory: Path, method: Method, tensors: Mapping[str, Tensor], expected: Mapping[str, tuple]) -> None:
    problems = [f"missing {key}" for key in expected if key not in tensors]
    problems += [f"unexpected {key}" for key in tensors if key not in expected and not method.ignores(key)]
    problems += [
        f"{key} has shape {list(tensors[key].shape)}, expected {list(shape)}"
        for key, shape in expected.items()
        if key in tensors and tuple(tensors[key].shape) != tuple(shape)
    ]
    problems += [
        f"{k} is {t.dtype}" for k, t in tensors.items() if method.must_be_float(k) and not t.is_floating_point()
    ]
    if problems:
        shown = "\n  ".join([*problems[:8], *([f"and {len(problems) - 8} more"] if len(problems) > 8 else [])])
        raise ValueError(f"load: {directory} is a checkpoint for another model:\n  {shown}")


def _same_methods(state: Attachment, name: str, read: Iterable[Method]) -> None:
    here, there = ({m.title for m in methods} for methods in (_methods("load", state, name), read))
    if here != there:
        raise ValueError(
            f"load: adapter {name!r} is {', '.join(sorted(here))}, the checkpoint {', '.join(sorted(there))}; "
            "load it under another name"
        )


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def _whole(tensor: Tensor) -> Tensor:
    """A copy of its own in memory, gathered if it is sharded."""
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _methods(op: str, state: Attachment, name: str) -> list[Method]:
    if name not in state.configs:
        raise ValueError(f"{op}: no adapter {name!r}, expected one of {', '.join(state.configs)}")
    return [method_of(op, config) for config in state.parts(name)]
