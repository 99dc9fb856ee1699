"""Selections on disk: ``adapter_config.json`` and ``adapter_model.safetensors`` with only what was trained.

Chosen tokens and whole normalisation layers are PEFT's TRAINABLE_TOKENS and LN_TUNING; the rest is FASTPEFT_SELECTIVE,
whose config is the explicit ``Selective`` and whose keys are names of parameters (``path.rows`` and so on for slices).
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..embeddings import input_embeddings
from ..formats.files import refuse_meta, write_json, write_tensors, writes_here
from ..formats.peft_files import CONFIG, PREFIX, WEIGHTS, Unserved, of_model, read_config, read_tensors
from ..method import Files
from ..own import innermost, own_at, own_modules
from .config import Selective
from .plan import Plan, is_norm

OWN, TOKENS, NORMS = "FASTPEFT_SELECTIVE", "TRAINABLE_TOKENS", "LN_TUNING"
DELTA, NORM = "trainable_tokens_delta", "ln_tuning_layers"
_ADAPTER, _BESIDE = "token_adapter", "trainable_token_indices"  # beside LoRA
FIELDS = ("params", "tokens", "rows", "columns", "add_missing_bias")
# Fields of PEFT's that do not change what was trained.
_WITHOUT_EFFECT = {
    *("auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "init_weights", "peft_type"),
    *("peft_version", "revision", "target_modules", "task_type", "token_indices"),
}


class SelectiveFiles(Files):
    """PEFT's TRAINABLE_TOKENS and LN_TUNING, else FASTPEFT_SELECTIVE."""

    def recognises(self, fields: Mapping) -> bool:
        return fields.get("peft_type") in (OWN, TOKENS, NORMS)

    def read(self, op: str, model: nn.Module, directory: Path, fields: Mapping) -> tuple[Selective, dict[str, Tensor]]:
        return read(op, model, directory, fields)

    def write(self, op: str, model: nn.Module, name: str, tensors: dict[str, Tensor], directory: Path) -> None:
        write(op, model, self.plan(model, name), tensors, directory)

    def parameters(self, model: nn.Module, name: str) -> dict[str, Tensor]:
        change = self.method.record(model).changes.of.get(name)
        return {} if change is None else change.parameters(model)

    def plan(self, model: nn.Module, name: str) -> Plan:
        """What the adapter trains."""
        return self.method.record(model).changes.of[name].plan


def write(op: str, model: nn.Module, plan: Plan, tensors: Mapping[str, Tensor], directory: str | os.PathLike) -> None:
    """Write ``tensors`` (by the keys of ``Change.parameters``) in the format that fits the plan.

    Raises:
        ValueError: a tensor has no values (meta). ImportError: safetensors is missing.
    """
    refuse_meta(op, tensors)
    fields, renamed = _as_peft(model, plan)
    if fields is None:
        explicit = plan.explicit()
        fields, renamed = {"peft_type": OWN, **{name: getattr(explicit, name) for name in FIELDS}}, {}
    fields |= {"base_model_name_or_path": getattr(model, "name_or_path", None) or None, "inference_mode": True}
    if not writes_here():
        return
    directory = Path(directory)
    write_tensors(op, directory / WEIGHTS, {PREFIX + renamed.get(key, key): t for key, t in tensors.items()})
    write_json(directory / CONFIG, fields)


def read(
    op: str, model: nn.Module, directory: str | os.PathLike, given: Mapping | None = None
) -> tuple[Selective, dict[str, Tensor]]:
    """The explicit config and the tensors of a checkpoint of ours or of PEFT's two.

    Raises:
        FileNotFoundError: a file is missing. ValueError: a pickled, truncated or foreign file.
    """
    directory = Path(directory)
    fields: Any = read_config(op, directory) if given is None else given
    kind = fields.get("peft_type") if isinstance(fields, Mapping) else None
    if kind not in (OWN, TOKENS, NORMS):
        raise ValueError(f"{op}: {directory / CONFIG} has peft_type={kind!r}, expected {OWN}, {TOKENS} or {NORMS}")
    check_fields(op, fields)
    tensors = read_tensors(op, directory)
    try:
        if kind == OWN:
            return Selective(**{name: fields[name] for name in FIELDS if fields.get(name)}), tensors
        if kind == TOKENS and any(f".{_ADAPTER}." in key for key in tensors):  # beside LoRA, which reads the rest
            tensors = {key: tensor for key, tensor in tensors.items() if key.endswith(f".{_ADAPTER}.{DELTA}")}
        mine = DELTA if kind == TOKENS else NORM
        rest = {of_model(key): tensor for key, tensor in tensors.items() if mine not in key.split(".")}
        tensors = {key: tensor for key, tensor in tensors.items() if mine in key.split(".")}
        config, found = _from_tokens(model, fields, tensors) if kind == TOKENS else _from_norms(tensors)
        return config, found | rest
    except (TypeError, ValueError) as error:
        raise ValueError(f"{op}: {directory / CONFIG} is no selection ({error})") from None


def check_fields(op: str, fields: Mapping) -> None:
    """Raise Unserved if a field asks for what is not served here."""
    for name, value in fields.items():
        if value and name not in _WITHOUT_EFFECT and (fields["peft_type"] != OWN or name not in FIELDS):
            raise Unserved(f"{op}: adapter_config.json has {name}={value!r}, which is not served")


def tokens_beside_lora(fields: Mapping) -> dict | None:
    """The fields of the token rows in a LoRA config of PEFT's (``trainable_token_indices``), or None."""
    ids = fields.get(_BESIDE) if isinstance(fields, Mapping) and fields.get("peft_type") == "LORA" else None
    return {"peft_type": TOKENS, "token_indices": ids, "base_model_name_or_path": None} if ids else None


def is_input_tokens(model: nn.Module, plan: Plan) -> bool:
    """Whether the plan is rows of the model's input embedding and nothing else, as PEFT has them beside LoRA."""
    if plan.whole or plan.biases or [part.kind for part in plan.slices] != ["tokens"]:
        return False
    return own_at(model, plan.slices[0].path) is innermost(input_embeddings(model))


def add_to_lora(op: str, plan: Plan, tensors: Mapping[str, Tensor], directory: Path) -> None:
    """Put token rows (``is_input_tokens``) into the LoRA checkpoint in ``directory``."""
    (part,) = plan.slices
    kept = {PREFIX + key: tensor for key, tensor in read_tensors(op, directory).items()}
    kept[f"{PREFIX}{part.path}.{_ADAPTER}.{DELTA}"] = tensors[part.key]
    write_tensors(op, directory / WEIGHTS, kept)
    fields: Any = read_config(op, directory)
    write_json(directory / CONFIG, {**fields, _BESIDE: part.index.tolist()})


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
        return fields | {"init_weights": True}, {part.key: f"{part.path}.{DELTA}"}
    if plan.slices or plan.biases:
        return None, {}
    modules = own_modules(model)
    renamed: dict[str, str] = {}
    norms = {path: module for path, module in modules.items() if path and is_norm(module)}
    for path, module in norms.items():
        names = [f"{path}.{name}" for name, _ in module.named_parameters()]
        if all(name in plan.whole for name in names):
            renamed.update((name, f"{path}.{NORM}.{name.removeprefix(path + '.')}") for name in names)
    if set(renamed) != set(plan.whole):
        return None, {}
    paths = sorted({name.rpartition(".")[0] for name in renamed})
    return {"peft_type": NORMS, "target_modules": paths}, renamed


def _from_tokens(
    model: nn.Module, fields: Mapping, tensors: Mapping[str, Tensor]
) -> tuple[Selective, dict[str, Tensor]]:
    ids, found, modules = fields.get("token_indices"), {}, own_modules(model)
    if not tensors:
        raise ValueError(f"there is no {DELTA} of the {len(ids or ())} token_indices")
    chosen: dict[str, dict[str, list[int]]] = {"tokens": {}, "rows": {}}
    table = getattr(input_embeddings(model), "weight", None)
    for key, rows in tensors.items():
        path, _, end = key.rpartition(".")
        path = path.removesuffix(f".{_ADAPTER}")
        numbers = next((ids[n] for n in ids if f".{path}".endswith(f".{n}")), None) if isinstance(ids, Mapping) else ids
        if end != DELTA or not isinstance(numbers, list) or len(numbers) != len(rows):
            raise ValueError(f"{key} is no {DELTA} of the {len(numbers or ())} token_indices")
        kind = "rows" if isinstance(modules.get(path), nn.Linear) else "tokens"
        chosen[kind][path] = numbers
        found[f"{path}.{kind}"] = rows[sorted(range(len(numbers)), key=numbers.__getitem__)]
    for path in [path for path in chosen["rows"] if getattr(modules[path], "weight", None) is table]:
        if [sorted(numbers) for numbers in chosen["tokens"].values()] != [sorted(chosen["rows"].pop(path))]:
            raise ValueError(f"{path} is tied to the embedding, and its token_indices are others than the embedding's")
        del found[f"{path}.rows"]  # the embedding's rows, which PEFT writes twice
    return Selective(tokens=chosen["tokens"], rows=chosen["rows"] or None), found


def _from_norms(tensors: Mapping[str, Tensor]) -> tuple[Selective, dict[str, Tensor]]:
    found = {}
    for key, tensor in tensors.items():
        parts = key.split(".")
        if NORM not in parts:
            raise ValueError(f"{key} is not of {NORM}")
        parts.remove(NORM)
        found[".".join(parts)] = tensor
    return Selective(params=list(found)), found
