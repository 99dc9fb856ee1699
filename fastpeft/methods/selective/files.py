"""Selections on disk: ``adapter_config.json`` and ``adapter_model.safetensors`` with only what was trained.

Chosen tokens and whole normalisation layers are PEFT's TRAINABLE_TOKENS and LN_TUNING; the rest is FASTPEFT_SELECTIVE,
whose config is the explicit ``Selective`` and whose keys are names of parameters (``path.rows`` and so on for slices).
"""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..formats.files import write_json, write_tensors
from ..formats.peft_files import CONFIG, PREFIX, WEIGHTS, read_config, read_tensors
from .config import Selective
from .plan import Plan, is_norm, original_at, own_modules
from .selection import Selection, select

OWN, TOKENS, NORMS = "FASTPEFT_SELECTIVE", "TRAINABLE_TOKENS", "LN_TUNING"
_DELTA, _NORM = "trainable_tokens_delta", "ln_tuning_layers"
_ADAPTER, _BESIDE = "token_adapter", "trainable_token_indices"  # beside LoRA
_FIELDS = ("params", "tokens", "rows", "columns", "add_missing_bias")
# Fields of PEFT's that do not change what was trained.
_WITHOUT_EFFECT = {
    *("auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "init_weights", "peft_type"),
    *("peft_version", "revision", "target_modules", "task_type", "token_indices"),
}


def write(op: str, model: nn.Module, plan: Plan, tensors: Mapping[str, Tensor], directory: str | os.PathLike) -> None:
    """Write ``tensors`` (by the keys of ``Change.parameters``) in the format that fits the plan.

    Raises:
        ValueError: a tensor has no values (meta). ImportError: safetensors is missing.
    """
    for key, tensor in tensors.items():
        if tensor.is_meta:
            raise ValueError(f"{op}: {key} is on the meta device, expected values")
    fields, renamed = _as_peft(model, plan)
    if fields is None:
        explicit = plan.explicit()
        fields, renamed = {"peft_type": OWN, **{name: getattr(explicit, name) for name in _FIELDS}}, {}
    fields |= {"base_model_name_or_path": getattr(model, "name_or_path", None) or None, "inference_mode": True}
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        return
    directory = Path(directory)
    write_tensors(op, directory / WEIGHTS, {PREFIX + renamed.get(key, key): t for key, t in tensors.items()})
    write_json(directory / CONFIG, fields)


def read(
    op: str, model: nn.Module, directory: str | os.PathLike, fields: Mapping | None = None
) -> tuple[Selective, dict[str, Tensor]]:
    """The explicit config and the tensors of a checkpoint of ours or of PEFT's two.

    Raises:
        FileNotFoundError: a file is missing. ValueError: a pickled, truncated or foreign file.
    """
    directory = Path(directory)
    fields = read_config(op, directory) if fields is None else fields
    kind = fields.get("peft_type") if isinstance(fields, Mapping) else None
    if kind not in (OWN, TOKENS, NORMS):
        raise ValueError(f"{op}: {directory / CONFIG} has peft_type={kind!r}, expected {OWN}, {TOKENS} or {NORMS}")
    for name, value in fields.items():
        if value and name not in _WITHOUT_EFFECT and (kind != OWN or name not in _FIELDS):
            raise ValueError(f"{op}: adapter_config.json has {name}={value!r}, which is not served")
    tensors = read_tensors(op, directory)
    try:
        if kind == OWN:
            return Selective(**{name: fields[name] for name in _FIELDS if fields.get(name)}), tensors
        if kind == TOKENS and any(f".{_ADAPTER}." in key for key in tensors):
            tensors = {key: tensor for key, tensor in tensors.items() if f".{_ADAPTER}." in key}
        return _from_tokens(model, fields, tensors) if kind == TOKENS else _from_norms(tensors)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{op}: {directory / CONFIG} is no selection ({error})") from None


def tokens_beside_lora(fields: Mapping) -> dict | None:
    """The fields of the token rows in a LoRA config of PEFT's (``trainable_token_indices``), or None."""
    ids = fields.get(_BESIDE) if isinstance(fields, Mapping) and fields.get("peft_type") == "LORA" else None
    return {"peft_type": TOKENS, "token_indices": ids, "base_model_name_or_path": None} if ids else None


def is_input_tokens(model: nn.Module, plan: Plan) -> bool:
    """Whether the plan is rows of the model's input embedding and nothing else, as PEFT has them beside LoRA."""
    if plan.whole or plan.biases or [part.kind for part in plan.slices] != ["tokens"]:
        return False
    return original_at(model, plan.slices[0].path) is _input_table(model)


def add_to_lora(op: str, model: nn.Module, plan: Plan, tensors: Mapping[str, Tensor], directory: Path) -> None:
    """Put token rows (``is_input_tokens``) into the LoRA checkpoint in ``directory``."""
    (part,) = plan.slices
    kept = {PREFIX + key: tensor for key, tensor in read_tensors(op, directory).items()}
    kept[f"{PREFIX}{part.path}.{_ADAPTER}.{_DELTA}"] = tensors[part.key]
    write_tensors(op, directory / WEIGHTS, kept)
    write_json(directory / CONFIG, {**read_config(op, directory), _BESIDE: part.index.tolist()})


def _input_table(model: nn.Module) -> nn.Module | None:
    table = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    return getattr(table, "base_layer", table)


def load_selective(model: nn.Module, directory: str | os.PathLike) -> Selection:
    """Select what a checkpoint trained and give it the values it had: of ``Selection.save``, or of PEFT.

    PEFT's TRAINABLE_TOKENS and LN_TUNING are read too. Training can go on from there; ``revert`` takes it off again.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a pickled, truncated or foreign file, or one for another model, with the keys and shapes that
            differ; nothing has been changed then. ImportError: safetensors is missing.
    """
    config, tensors = read("load_selective", model, directory)
    selection = select(model, **{name: getattr(config, name) for name in _FIELDS})
    try:
        fill("load_selective", directory, dict(selection.named_parameters()), tensors)
    except ValueError:
        selection.revert()
        raise
    return selection


@torch.no_grad()
def fill(op: str, directory, destinations: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copy every tensor to its place.

    Raises:
        ValueError: a key is missing or unexpected, or a shape differs; nothing has been copied then.
    """
    problems = [f"missing {key}" for key in destinations if key not in tensors]
    problems += [f"unexpected {key}" for key in tensors if key not in destinations]
    problems += [
        f"{key} has shape {list(tensors[key].shape)}, expected {list(place.shape)}"
        for key, place in destinations.items()
        if key in tensors and tensors[key].shape != place.shape
    ]
    if problems:
        raise ValueError(f"{op}: {directory} is a checkpoint for another model:\n  " + "\n  ".join(problems[:8]))
    for key, place in destinations.items():
        place.copy_(tensors[key])


def _as_peft(model: nn.Module, plan: Plan) -> tuple[dict | None, dict[str, str]]:
    """PEFT's fields and our keys by theirs, if PEFT has this selection."""
    if not plan.whole and not plan.biases and len(plan.slices) == 1 and plan.slices[0].kind == "tokens":
        (part,) = plan.slices
        fields = {"peft_type": TOKENS, "token_indices": part.index.tolist(), "target_modules": [part.path]}
        return fields | {"init_weights": True}, {part.key: f"{part.path}.{_DELTA}"}
    if plan.slices or plan.biases:
        return None, {}
    modules, renamed = own_modules(model), {}
    norms = {path: module for path, module in modules.items() if path and is_norm(module)}
    for path, module in norms.items():
        names = [f"{path}.{name}" for name, _ in module.named_parameters()]
        if all(name in plan.whole for name in names):
            renamed.update((name, f"{path}.{_NORM}.{name.removeprefix(path + '.')}") for name in names)
    if set(renamed) != set(plan.whole):
        return None, {}
    paths = sorted({name.rpartition(".")[0] for name in renamed})
    return {"peft_type": NORMS, "target_modules": paths}, renamed


def _from_tokens(
    model: nn.Module, fields: Mapping, tensors: Mapping[str, Tensor]
) -> tuple[Selective, dict[str, Tensor]]:
    ids, found, tables, modules = fields.get("token_indices"), {}, {}, own_modules(model)
    for key, rows in tensors.items():
        path, _, end = key.rpartition(".")
        path = path.removesuffix(f".{_ADAPTER}")
        if isinstance(modules.get(path), nn.Linear):
            continue  # tied to the embedding, whose rows PEFT writes twice
        numbers = ids.get(path.rpartition(".")[2], ids.get(path)) if isinstance(ids, Mapping) else ids
        if end != _DELTA or not isinstance(numbers, list) or len(numbers) != len(rows):
            raise ValueError(f"{key} is no {_DELTA} of the {len(numbers or ())} token_indices")
        tables[path] = numbers
        found[f"{path}.tokens"] = rows[sorted(range(len(numbers)), key=numbers.__getitem__)]
    return Selective(tokens=tables), found


def _from_norms(tensors: Mapping[str, Tensor]) -> tuple[Selective, dict[str, Tensor]]:
    found = {}
    for key, tensor in tensors.items():
        parts = key.split(".")
        if _NORM not in parts:
            raise ValueError(f"{key} is not of {_NORM}")
        parts.remove(_NORM)
        found[".".join(parts)] = tensor
    return Selective(params=list(found)), found
