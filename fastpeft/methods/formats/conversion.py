"""Checkpoints from one library's format into another's, as far as both have words for them; no model is needed."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from .adapterhub_files import write_hub
from .adapterhub_format import VERSION
from .files import write_json, write_tensors
from .peft_files import CONFIG, PREFIX, WEIGHTS, without_prefix
from .peft_format import from_peft
from .verdict import examine

FORMATS = ("peft", "adapters", "fastpeft")
_PROMPT = "prompt_tuning.prompt_tunings.{name}.prompt_embedding.weight"
# The parts of a model that AdapterHub's LoRA knows, by the ends of paths: BERT's and Llama's names.
_PARTS = {
    "query": "q", "key": "k", "value": "v", "q_proj": "q", "k_proj": "k", "v_proj": "v",
    "intermediate.dense": "intermediate_lora", "output.dense": "output_lora",
    "down_proj": "intermediate_lora", "up_proj": "output_lora",
}  # fmt: skip


def convert(source: str | os.PathLike, destination: str | os.PathLike, to: str) -> str:
    """Write the checkpoint in ``source`` to ``destination`` in another format; returns what was done.

    ``"fastpeft"`` is the format that ``fastpeft.save`` writes: PEFT's, but AdapterHub's for bottleneck adapters. A
    pickled file becomes safetensors; nothing but tensors is ever unpickled.

    Raises:
        FileNotFoundError: a file is missing. FileExistsError: destination holds a checkpoint.
        ValueError: the other format cannot say it, with the reason. Nothing has been written then.
    """
    if to not in FORMATS:
        raise ValueError(f"convert: to is {to!r}, expected one of {', '.join(FORMATS)}")
    source, destination = Path(source), Path(destination)
    if (destination / CONFIG).exists():
        raise FileExistsError(f"convert: {destination} holds a checkpoint already, expected a new folder")
    verdict = examine("convert", source, unpickle=True)
    hub = verdict.format == "AdapterHub"
    inner = verdict.fields["config"] if hub and not verdict.faults else None
    own_words = isinstance(inner, Mapping) and inner.get("architecture") in ("lora", "prompt_tuning")
    verdict.refuse(unserved=not own_words and (hub or to == "fastpeft"))
    run = _from_hub if hub else _from_peft
    return run(verdict.tensors, destination, verdict.fields, to)


def _from_peft(tensors: Mapping[str, Tensor], destination: Path, fields: Mapping, to: str) -> str:
    kind = fields["peft_type"]
    tensors = without_prefix("convert", "it", dict(tensors)) if kind == "LORA" else tensors
    if to == "adapters":
        if kind == "LORA":
            config, keys = _lora_to_hub(fields, tensors)
        elif kind == "PROMPT_TUNING":
            config = {"architecture": "prompt_tuning", "prompt_length": fields["num_virtual_tokens"]}
            config |= {"combine": "prefix", "prompt_init": "random_uniform", "prompt_init_text": None}
            keys = {_PROMPT.format(name="default"): tensors["prompt_embeddings"]}
        else:
            raise ValueError(f"convert: AdapterHub has no form for peft_type={kind!r} that can be made without a model")
        outer = {"config": config, "name": "default", "version": VERSION, "model_name": _base(fields)}
        write_hub("convert", destination, keys, outer | {"hidden_size": None, "model_class": None, "model_type": None})
        return f"{kind} of PEFT as AdapterHub's, {len(keys)} tensors"
    if str(kind).startswith("FASTPEFT") and to == "peft":
        raise ValueError(f"convert: PEFT has no form for peft_type={kind!r}")
    whole = {PREFIX + key: value for key, value in tensors.items()} if kind == "LORA" else tensors
    write_tensors("convert", destination / WEIGHTS, {key: value.contiguous() for key, value in whole.items()})
    write_json(destination / CONFIG, fields)
    return f"{kind} of PEFT, {len(whole)} tensors in safetensors"


def _from_hub(tensors: Mapping[str, Tensor], destination: Path, fields: Mapping, to: str) -> str:
    inner = fields["config"]
    kind = inner.get("architecture") if isinstance(inner, Mapping) else None
    if to == "adapters" or (kind is None and to == "fastpeft"):
        write_hub("convert", destination, {key: value.contiguous().clone() for key, value in tensors.items()}, fields)
        return f"{kind or 'bottleneck'} of AdapterHub, {len(tensors)} tensors in safetensors as well"
    if kind == "lora":
        config, keys = _lora_to_peft(fields, tensors)
    elif kind == "prompt_tuning":
        config, keys = _prompt_to_peft(fields, tensors)
    else:
        what = "bottleneck adapters" if kind is None else f"what AdapterHub calls {kind}"
        raise ValueError(f"convert: PEFT has no form for {what} that can be made without a model")
    config |= {"base_model_name_or_path": fields.get("model_name") or None, "inference_mode": True, "task_type": None}
    write_tensors("convert", destination / WEIGHTS, {key: value.contiguous() for key, value in keys.items()})
    write_json(destination / CONFIG, config)
    return f"{kind} of AdapterHub as PEFT's, {len(keys)} tensors"


def _lora_to_peft(fields: Mapping, tensors: Mapping[str, Tensor]) -> tuple[dict, dict[str, Tensor]]:
    inner, found = fields["config"], {}
    for name in ("use_gating", "use_dora", "vera_d", "vera_b"):
        if inner.get(name):
            raise ValueError(f"convert: PEFT's LoRA has no form for {name}={inner[name]!r}")
    if inner.get("composition_mode", "add") != "add":
        raise ValueError(
            f"convert: PEFT's LoRA has no form for composition_mode={inner['composition_mode']!r} ((IA)^3)"
        )
    for key, tensor in tensors.items():
        match = re.fullmatch(r"(?P<path>.*)\.loras\.[^.]+\.(?P<part>lora_[AB])", key)
        if match is None:
            raise ValueError(f"convert: {key} has no place in PEFT's LoRA")
        found[f"{PREFIX}{match['path']}.{match['part']}.weight"] = tensor
    for key, down in found.items():
        if ".lora_A." in key and down.shape[0] != found[key.replace(".lora_A.", ".lora_B.")].shape[1]:
            raise ValueError(f"convert: {key} adapts several matrices in one, which PEFT's LoRA cannot say")
    paths = sorted({key.removeprefix(PREFIX).rpartition(".lora_")[0] for key in found})
    config = {"peft_type": "LORA", "r": inner["r"], "lora_alpha": inner["alpha"], "lora_dropout": inner["dropout"]}
    config |= {"target_modules": paths, "bias": "none", "fan_in_fan_out": False}
    return config, found


def _lora_to_hub(fields: Mapping, tensors: Mapping[str, Tensor]) -> tuple[dict, dict[str, Tensor]]:
    lora = from_peft("convert", fields)
    plain = {"rank_pattern": {}, "alpha_pattern": {}, "bias": "none", "lora_bias": False, "rslora": False}
    plain |= {"modules_to_save": (), "experts": False}
    for name, value in plain.items():
        if getattr(lora, name) != value:
            raise ValueError(f"convert: AdapterHub's LoRA has no form for {name}={getattr(lora, name)!r}")
    by_layer: dict[int, set[str]] = {}
    keys = {}
    for key, tensor in tensors.items():
        path, _, part = key.removesuffix(".weight").rpartition(".")
        ends = (".".join(path.split(".")[-n:]) for n in (1, 2))
        known = (
            None if path.endswith("attention.output.dense") else next((_PARTS[e] for e in ends if e in _PARTS), None)
        )
        number = re.search(r"\.(\d+)\.", path)
        if known is None or number is None:
            raise ValueError(f"convert: AdapterHub's LoRA has no adapter at {path}")
        by_layer.setdefault(int(number[1]), set()).add(known)
        keys[f"{path}.loras.default.{part}"] = tensor
    parts = next(iter(by_layer.values()))
    if any(other != parts for other in by_layer.values()):
        raise ValueError("convert: AdapterHub's LoRA adapts the same modules in every layer, these differ")
    config = {
        "architecture": "lora", "alpha": lora.alpha, "r": lora.r, "dropout": lora.dropout, "composition_mode": "add",
        "attn_matrices": sorted(parts & {"q", "k", "v"}), "selfattn_lora": bool(parts & {"q", "k", "v"}),
        "intermediate_lora": "intermediate_lora" in parts, "output_lora": "output_lora" in parts,
        "leave_out": [i for i in range(max(by_layer)) if i not in by_layer], "init_weights": "lora",
        "use_gating": False,
    }  # fmt: skip
    return config, keys


def _prompt_to_peft(fields: Mapping, tensors: Mapping[str, Tensor]) -> tuple[dict, dict[str, Tensor]]:
    inner = fields["config"]
    if inner.get("combine", "prefix") != "prefix":
        raise ValueError(f"convert: PEFT's prompt tuning has no form for combine={inner['combine']!r}")
    found = [tensor for key, tensor in tensors.items() if key.endswith(".prompt_embedding.weight")]
    if len(found) != 1:
        raise ValueError(f"convert: {len(found)} prompts in the file, expected 1")
    config = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": found[0].shape[0], "token_dim": found[0].shape[1]}
    return config | {"prompt_tuning_init": "RANDOM", "num_transformer_submodules": 1}, {"prompt_embeddings": found[0]}


def _base(fields: Mapping) -> str:
    return fields.get("base_model_name_or_path") or ""
