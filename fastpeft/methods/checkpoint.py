"""Adapters on disk, each in the format of the library that most use for its method: ``save`` and ``load``.

Which files, the method says (``method.Files``): LoRA's are PEFT's, bottleneck adapters' AdapterHub's. An
adapter of several methods is a folder with one checkpoint in a sub-folder for each.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from .attach import apply_all, resolve_all, take_back
from .attachment import Attachment, attachment_of, holder_of, state_of
from .carried import carried_keys, carry, resize, take_carried, vocabulary_of
from .embeddings import tied_to_embeddings
from .formats.files import refuse_meta, safetensors, whole, writes_here
from .formats.peft_files import CONFIG, add_tensors, warn_of_another_base
from .formats.verdict import examine
from .method import Files, Method
from .originals import disabled
from .placement import in_memory, model_inside
from .registry import METHODS, method_named, method_of
from .selective.files import SelectiveFiles, add_to_lora, is_input_tokens, tokens_beside_lora
from .switch import refuse_merged, set_adapter


def adapter_state_dict(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """The parameters of one adapter, by their names in its checkpoints; the tensors are the model's own.

    Args:
        model: A model that adapters are attached to, or a wrapper around it.
        name: The adapter's name.

    Raises:
        ValueError: There is no such adapter.
    """
    holder, state = holder_of("adapter_state_dict", model)
    tensors: dict[str, Tensor] = {}
    for method in _methods("adapter_state_dict", state, name):
        found = method.files.parameters(holder, name)
        tensors.update((method.files.key(key), tensor.detach()) for key, tensor in found.items())
    return tensors


def save(model: nn.Module, directory: str | os.PathLike, name: str = "default") -> None:
    """Write one adapter: LoRA, prompts and prefixes as PEFT would, bottleneck adapters as ``adapters`` would.

    An adapter of several methods gets a sub-folder for each. Sharded parameters are gathered, so with FSDP2 every
    process calls this; in a process group rank 0 alone writes.

    Args:
        model: A model that adapters are attached to, or a wrapper around it.
        directory: The folder, which is made if it is not there. Files of the same names are replaced, each as a whole.
        name: The adapter's name.

    Raises:
        ValueError: There is no such adapter, the adapters are merged, or parameters have no values (meta). Nothing has
            been written then.
        ImportError: safetensors is missing.
    """
    safetensors("save")
    holder, state = holder_of("save", model)
    methods = _methods("save", state, name)
    refuse_merged("save", holder, state)
    parts = {m.name: (m.files, {key: whole(t) for key, t in m.files.parameters(holder, name).items()}) for m in methods}
    brought = {key: whole(tensor) for key, tensor in carried_keys(holder, state, name).items()}
    for files, tensors in parts.values():
        refuse_meta("save", {files.key(key): tensor for key, tensor in tensors.items()})
    if not writes_here():
        return
    directory = Path(directory)
    homes = {part: directory / part if len(parts) > 1 else directory for part in parts}
    tokens = (
        cast(SelectiveFiles, parts["selective"][0]).plan(holder, name)
        if parts.keys() == {"lora", "selective"}
        else None
    )
    if tokens is not None and is_input_tokens(holder, tokens):  # PEFT keeps these two in one checkpoint
        homes["lora"] = directory
        parts["lora"][0].write("save", holder, name, parts["lora"][1], directory)
        add_to_lora("save", tokens, parts["selective"][1], directory)
    else:
        for part, (files, tensors) in parts.items():
            files.write("save", holder, name, tensors, homes[part])
    if brought:
        add_tensors("save", next((homes[part] for part in homes if part != "bottleneck"), directory), brought)


def load(
    model: nn.Module, directory: str | os.PathLike, name: str = "default", is_trainable: bool = False
) -> nn.Module:
    """Read what ``save``, PEFT or ``adapters`` wrote: into the adapter ``name`` if there is one, else into a new one.

    A new adapter is attached as the checkpoint's config says; the first of a model is active. It is frozen unless
    ``is_trainable``, as in PEFT; the model stays in the mode, training or evaluation, that it is in. Values are
    converted to the parameters' dtype. Where PEFT wrote the model's embedding or head too (a resized vocabulary), the
    model computes with those values while the adapter is active.

    Args:
        model: The model that the checkpoint is for, with or without adapters, or a wrapper around it.
        directory: The folder with the checkpoint, or with a folder of it for each of an adapter's methods.
        name: The adapter's name in the model; a checkpoint holds none.
        is_trainable: Whether the first adapter of a model asks for gradients, to train on. Another new one is inactive
            and trains once ``set_adapter`` says so; one that is there keeps its flags.

    Returns:
        The same model.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is pickled, truncated or foreign, the config is not served, values are not finite, or the
            checkpoint is for another model, with the keys and shapes that differ. Nothing has been changed then.
        ImportError: safetensors is missing.

    Warns:
        UserWarning: The checkpoint names another base model than this one's ``name_or_path``.
    """
    safetensors("load")
    attached = isinstance(model, nn.Module) and any(attachment_of(module) is not None for module in model.modules())
    holder, state = holder_of("load", model) if attached else (model_inside("load", model), None)
    parts = _parts(directory)
    read = [(folder, m, *m.files.read("load", holder, folder, fields)) for folder, m, fields in parts]
    if is_trainable and any(part[2].get("ensure_weight_tying") for part in parts) and tied_to_embeddings(holder):
        text = "ensure_weight_tying would have to keep the adapters of tied layers equal while they train"
        raise ValueError(f"load: {text}, which is not served, expected is_trainable=False")
    new = state is None or name not in state.configs
    if state is None or new:
        configs = tuple(config for _, _, config, _ in read)
        plans = resolve_all("load", holder, configs, name, strict=False)
        with disabled(holder):
            expected = [
                method.files.expected(holder, config, plan) for (_, method, config, _), (_, plan) in zip(read, plans)
            ]
    else:
        refuse_merged("load", holder, state)
        _same_methods(state, name, [method for _, method, _, _ in read])
        expected = [_shapes(method.files.parameters(holder, name)) for _, method, _, _ in read]
    carried: dict[str, Tensor] = {}
    for (folder, method, _, tensors), shapes in zip(read, expected, strict=True):
        carried |= take_carried("load", holder, folder, tensors, shapes)
        if shapes is not None:
            _compare(holder, folder, method.files, tensors, shapes)
    if new:
        flags = [(parameter, parameter.requires_grad) for parameter in holder.parameters()]
        apply_all(holder, configs, name, plans)
        try:
            for (folder, method, _, tensors), shapes in zip(read, expected, strict=True):
                if shapes is None:
                    _compare(holder, folder, method.files, tensors, _shapes(method.files.parameters(holder, name)))
        except ValueError:
            take_back(holder, name, flags)
            raise
        if state is None:
            set_adapter(holder, name, trainable=is_trainable)
    with torch.no_grad():
        for _, method, _, tensors in read:
            for key, destination in method.files.parameters(holder, name).items():
                in_memory(destination).copy_(tensors[key])
    with disabled(holder):
        carry(holder, state_of(holder), name, carried)
    warn_of_another_base("load", holder, [fields for _, _, fields in parts])
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
        verdict = examine("load", folder)
        verdict.refuse()
        fields, method = verdict.fields, cast(Method, verdict.method)
        tokens = tokens_beside_lora(fields)
        found.append((folder, method, fields if tokens is None else {**fields, "trainable_token_indices": None}))
        if tokens is not None:
            found.append((folder, method_named("selective"), tokens))
    return found


def _compare(
    model: nn.Module, directory: Path, files: Files, tensors: Mapping[str, Tensor], expected: Mapping[str, tuple]
) -> None:
    for key, shape in expected.items():
        table = vocabulary_of(model, key)
        given = tuple(tensors[key].shape) if key in tensors else shape
        differing = [(ours, theirs) for ours, theirs in zip(shape, given) if ours != theirs]
        if table is not None and len(shape) == len(given) and [ours for ours, _ in differing] == [table.shape[0]]:
            raise ValueError(f"load: {directory} has {key} {list(given)}, {resize(table, differing[0][1])}")
    problems = [f"missing {key}" for key in expected if key not in tensors]
    problems += [f"unexpected {key}" for key in tensors if key not in expected and not files.ignores(key)]
    problems += [
        f"{key} has shape {list(tensors[key].shape)}, expected {list(shape)}"
        for key, shape in expected.items()
        if key in tensors and tuple(tensors[key].shape) != tuple(shape)
    ]
    problems += [
        f"{k} is {t.dtype}" for k, t in tensors.items() if files.must_be_float(k) and not t.is_floating_point()
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


def _methods(op: str, state: Attachment, name: str) -> list[Method]:
    state.check_known(op, name)
    return [method_of(op, config) for config in state.parts(name)]
