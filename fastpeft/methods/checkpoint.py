"""Adapters on disk in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``, either way round.

Files are written beside their place and renamed into it, so a reader never sees half a file.
"""

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..nn.base_layer import is_conv1d
from ..nn.lora import LoraLinear
from ..nn.trained_copy import TrainedCopy
from .attach import apply, check_attachable
from .attachment import Attachment, attachment_of, holder_of, original_names, refuse_merged
from .lora import Lora
from .peft_files import CONFIG, PREFIX, WEIGHTS, read_config, read_tensors, safetensors
from .peft_format import from_peft, to_peft
from .targets import Targets, resolve, walk


def adapter_state_dict(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """The parameters of one adapter, by their names in PEFT's checkpoints; the tensors are the model's own."""
    holder, state = holder_of("adapter_state_dict", model)
    _known("adapter_state_dict", state, name)
    return {PREFIX + key: tensor.detach() for key, tensor in _destinations(holder, state, name).items()}


def save(model: nn.Module, directory: str | os.PathLike, name: str = "default") -> None:
    """Write one adapter as PEFT would: ``PeftModel.from_pretrained(base_model, directory)`` reads it.

    Sharded parameters are gathered, so with FSDP2 every process calls this; in a process group rank 0 alone writes.

    Raises:
        ValueError: no such adapter, merged, or parameters without values (meta); nothing has been written then.
        ImportError: safetensors is missing.
    """
    library = safetensors("save")
    holder, state = holder_of("save", model)
    config = _known("save", state, name)
    refuse_merged("save", holder, state)
    tensors = {key: _whole(tensor) for key, tensor in adapter_state_dict(holder, name).items()}
    for key, tensor in tensors.items():
        if tensor.is_meta:
            raise ValueError(f"save: {key} is on the meta device, expected values")
    linears = [path for path in state.linears if name in holder.get_submodule(path).adapters]
    conv1d = any(is_conv1d(holder.get_submodule(path).base_layer) for path in linears)
    paths = [path for path, _ in walk(holder)]
    fields = to_peft(config, linears, paths, conv1d, getattr(holder, "name_or_path", None) or None)
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        return
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    _write(directory / WEIGHTS, lambda path: library.save_file(tensors, path, metadata={"format": "pt"}))
    _write(directory / CONFIG, lambda path: Path(path).write_text(json.dumps(fields, indent=2) + "\n", "utf-8"))


def load(model: nn.Module, directory: str | os.PathLike, name: str = "default") -> nn.Module:
    """Read an adapter that ``save`` or PEFT wrote: into the adapter ``name`` if there is one, else into a new one.

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
    directory = Path(directory)
    config = from_peft("load", read_config("load", directory))
    tensors = read_tensors("load", directory)
    attached = isinstance(model, nn.Module) and any(attachment_of(module) is not None for module in model.modules())
    holder, state = holder_of("load", model) if attached else (model, None)
    targets = None
    if state is None or name not in state.configs:
        check_attachable("load", holder, config, name)
        targets = resolve("load", holder, config, strict=False)
        expected = _expected(holder, config, targets)
    else:
        refuse_merged("load", holder, state)
        expected = {key: tuple(tensor.shape) for key, tensor in _destinations(holder, state, name).items()}
    _compare(directory, tensors, expected)
    if targets is not None:
        apply(holder, config, name, targets)
    destinations = _destinations(holder, attachment_of(holder), name)
    with torch.no_grad():
        for key, destination in destinations.items():
            destination.copy_(tensors[key])
    return model


def _destinations(model: nn.Module, state: Attachment, name: str) -> dict[str, Tensor]:
    """The adapter's tensors in the model, by their keys without PEFT's prefix."""
    tensors, config = {}, state.configs[name]
    for path in state.linears:
        layer = model.get_submodule(path)
        if name in layer.adapters:
            adapter = layer.adapters[name]
            tensors[f"{path}.lora_A.weight"] = adapter.lora_A
            tensors[f"{path}.lora_B.weight"] = adapter.lora_B
            if adapter.lora_bias is not None:
                tensors[f"{path}.lora_B.bias"] = adapter.lora_bias
    for path in state.copies:
        copies = model.get_submodule(path).copies
        if name in copies:
            tensors.update((f"{path}.{key}", value) for key, value in copies[name].state_dict(keep_vars=True).items())
    if config.bias != "none":
        names = original_names(model, state)
        tensors.update((_bias_key(original, state.linears), names[original]) for original in state.biases)
    return tensors


def _expected(model: nn.Module, config: Lora, targets: Targets) -> dict[str, tuple[int, ...]]:
    """Keys and shapes that the adapter would have once it is attached."""
    shapes = {}
    for path in targets.linears:
        module = model.get_submodule(path)
        base = module.base_layer if isinstance(module, LoraLinear) else module
        n, k = base.weight.T.shape if is_conv1d(base) else base.weight.shape
        r = config.rank_of(path)
        shapes[f"{path}.lora_A.weight"], shapes[f"{path}.lora_B.weight"] = (r, k), (n, r)
        if config.lora_bias:
            shapes[f"{path}.lora_B.bias"] = (n,)
        if config.bias == "lora_only" and base.bias is not None:
            shapes[f"{path}.base_layer.bias"] = (n,)
    for path in targets.copies:
        module = model.get_submodule(path)
        module = module.original_module if isinstance(module, TrainedCopy) else module
        shapes.update((f"{path}.{key}", tuple(value.shape)) for key, value in module.state_dict().items())
    if config.bias == "all":
        for original, parameter in model.named_parameters():
            if (original == "bias" or original.endswith(".bias")) and not original.startswith(_dotted(targets.copies)):
                shapes[_bias_key(original, targets.linears)] = tuple(parameter.shape)
    return shapes


def _bias_key(original: str, linears) -> str:
    path = original.rpartition(".")[0]
    return f"{path}.base_layer.bias" if path in linears else original


def _dotted(paths) -> tuple[str, ...]:
    return tuple(f"{path}." for path in paths)


def _compare(directory: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    problems = [f"missing {key}" for key in expected if key not in tensors]
    # PEFT saves biases of a copied module three times when it trains all biases; the copy's own are the ones it reads.
    extra = [
        key for key in tensors if key not in expected and not {"original_module", "modules_to_save"} & {*key.split(".")}
    ]
    problems += [f"unexpected {key}" for key in extra]
    problems += [
        f"{key} has shape {list(tensors[key].shape)}, expected {list(shape)}"
        for key, shape in expected.items()
        if key in tensors and tuple(tensors[key].shape) != shape
    ]
    problems += [f"{k} is {t.dtype}" for k, t in tensors.items() if ".lora_" in k and not t.is_floating_point()]
    if problems:
        shown = "\n  ".join([*problems[:8], *([f"and {len(problems) - 8} more"] if len(problems) > 8 else [])])
        raise ValueError(f"load: {directory} is a checkpoint for another model:\n  {shown}")


def _write(path: Path, write: Callable[[str], object]) -> None:
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


def _whole(tensor: Tensor) -> Tensor:
    """A copy of its own in memory, gathered if it is sharded."""
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _known(op: str, state: Attachment, name: str) -> Lora:
    if name not in state.configs:
        raise ValueError(f"{op}: no adapter {name!r}, expected one of {', '.join(state.configs)}")
    return state.configs[name]
