"""What a folder holds and what is wrong with it, without a model: one answer for inspect, convert, load and a bank.

A *fault* is a broken checkpoint; nobody takes it. What is *unserved* is whole, but nothing here computes it: ``load``
and a bank refuse it with this sentence, ``convert`` may still write it in another format.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..bottleneck.files import PEFT_TYPE, own_config
from ..lora.config import Lora
from ..lora.experts_apart import is_apart
from ..method import Method
from ..registry import METHODS
from ..selective.files import DELTA, NORM, NORMS, TOKENS, tokens_beside_lora
from ..selective.files import check_fields as check_selection
from ..targets import ALL_LINEAR, ends_with
from ..targets import names as means
from .adapterhub_files import read_hub_tensors
from .adapterhub_format import from_hub
from .files import read_safetensors
from .peft_files import CONFIG, PICKLED, PREFIX, Unserved, read_config, weights_of, without_prefix
from .peft_format import from_peft
from .peft_prompts import EMBEDDINGS, check_fields

_PAIR = re.compile(r"(?P<path>.+)\.lora_(?P<embedding>embedding_)?(?P<half>[AB])(?P<end>\.weight)?")
# What else a LoRA checkpoint may hold: token rows, a bias of B, and parameters of the model itself.
_BESIDE = re.compile(r".+\.(token_adapter\.trainable_tokens_delta|lora_B\.bias|weight|bias)")
_MAGNITUDE = ".lora_magnitude_vector"  # DoRA's
_PROMPTS = {"PROMPT_TUNING": "prompt tuning", "PREFIX_TUNING": "prefix tuning"}


@dataclass
class Verdict:
    """One folder.

    Attributes:
        op: the function that errors name. directory: where it lies. fields: of its config.
        format: "PEFT", "AdapterHub", "fastpeft" or "unknown".
        kind: what it is, in words. method: what loads it, or None.
        tensors: by the keys of the file. pickled: whether that file is pickled, which only ``convert`` opens.
        faults, unserved: what is wrong; the first is what an error says.
        notes: what a user should know.
    """

    op: str
    directory: Path
    fields: Any
    format: str = "unknown"
    kind: str = "unknown"
    method: Method | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    pickled: bool = False
    faults: list[Exception] = field(default_factory=list)
    unserved: list[Exception] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        """Every fault and what is unserved, a sentence each, without the function's name."""
        return [str(error).removeprefix(f"{self.op}: ") for error in (*self.faults, *self.unserved)]

    def refuse(self, unserved: bool = True) -> None:
        """Raise the first of its faults, or of what is unserved."""
        for error in (*self.faults, *(self.unserved if unserved else ())):
            raise error

    def fault(self, text: str) -> None:
        """Note one."""
        self.faults.append(ValueError(f"{self.op}: {self.directory} is broken: {text}"))


def examine(
    op: str,
    directory: Path,
    fields: object = None,
    tensors: Mapping[str, Tensor] | None = None,
    unpickle: bool = False,
) -> Verdict:
    """Read a folder and judge it.

    Args:
        op: The function to name in errors.
        directory: The folder.
        fields: What stands for its adapter_config.json, or None.
        tensors: What stands for its weights, or None.
        unpickle: Whether tensors, and nothing but tensors, are read from a pickled file of PEFT's.

    Raises:
        FileNotFoundError: There is no adapter_config.json. ValueError: It is no JSON.
    """
    given: Any = read_config(op, directory) if fields is None else fields
    found = Verdict(op, directory, given)
    if not isinstance(given, Mapping) or not {"peft_type", "config"} & given.keys():
        why = "neither PEFT's (peft_type) nor AdapterHub's (config)"
        found.faults.append(ValueError(f"{op}: {directory / CONFIG} is {why}"))
        return found
    hub = "peft_type" not in given
    own = not hub and str(given["peft_type"]).startswith("FASTPEFT")
    found.format, found.kind = "AdapterHub" if hub else "fastpeft" if own else "PEFT", kind_of(given)
    found.method = next((m for m in METHODS if m.files.recognises(given)), None)
    _read(found, tensors, unpickle)
    _judge_config(found)
    if found.tensors:
        _judge_values(found)
    return found


def kind_of(fields: Mapping) -> str:
    """What a checkpoint with these fields is, in words: "LoRA", "prompt tuning", "PEFT's VERA", ..."""
    if "peft_type" in fields:
        kind = str(fields["peft_type"])
        if kind == "LORA":
            return "LoRA" if not fields.get("use_dora") else "LoRA with DoRA"
        known = {**_PROMPTS, TOKENS: "token rows", NORMS: "normalisation layers", PEFT_TYPE: "bottleneck adapters"}
        return known.get(kind, "a selection" if kind.startswith("FASTPEFT") else f"PEFT's {kind}")
    inner = fields.get("config")
    architecture = inner.get("architecture") if isinstance(inner, Mapping) else None
    phm = isinstance(inner, Mapping) and inner.get("phm_layer")
    return f"AdapterHub's {architecture or ('Compacter' if phm else 'bottleneck adapters')}"


def _read(found: Verdict, given: Mapping[str, Tensor] | None, unpickle: bool) -> None:
    op, directory = found.op, found.directory
    try:
        if given is not None:
            found.tensors = dict(given)
        elif found.format == "AdapterHub":
            found.tensors = read_hub_tensors(op, directory)
        else:
            found.tensors = _peft_tensors(found, unpickle)
        if found.fields.get("peft_type") in ("LORA", TOKENS, NORMS):
            without_prefix(op, directory, found.tensors)  # raises where keys are foreign
        elif not found.tensors:
            raise ValueError(f"{op}: {directory} has no tensors")
    except (OSError, ValueError) as error:
        found.faults.append(error)


def _peft_tensors(found: Verdict, unpickle: bool) -> dict[str, Tensor]:
    pickled = found.directory / PICKLED
    try:
        path = weights_of(found.op, found.directory)
    except ValueError:
        found.pickled = True
        if not (unpickle and pickled.is_file()):
            raise
        return _unpickled(found.op, pickled)
    return read_safetensors(found.op, path)


def _unpickled(op: str, path: Path) -> dict[str, Tensor]:
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of zipfile, pickle and torch, by what is wrong
        raise ValueError(f"{op}: {path} is truncated or holds more than tensors ({error})") from None
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError(f"{op}: {path} holds {type(tensors).__name__}, expected a dict of tensors")
    return dict(tensors)


def _judge_config(found: Verdict) -> None:
    op, fields = found.op, found.fields
    try:
        if fields.get("peft_type") == "LORA":
            beside = tokens_beside_lora(fields)
            config = from_peft(op, fields if beside is None else {**fields, "trainable_token_indices": None})
            if found.tensors:
                _judge_lora(found, config)
        elif fields.get("peft_type") in _PROMPTS:
            _judge_prompt(found, check_fields(op, fields))
        elif found.format == "AdapterHub" or fields["peft_type"] == PEFT_TYPE:
            own_config(op, fields) if found.format == "fastpeft" else from_hub(op, fields)
            if found.tensors:
                _judge_bottleneck(found)
        elif found.method is not None:
            check_selection(op, fields)
            _judge_selection(found)
        else:
            raise Unserved(f"{op}: {found.directory} is {found.kind}: peft_type={fields['peft_type']!r} is not served")
    except (ValueError, TypeError) as error:
        (found.unserved if isinstance(error, Unserved) else found.faults).append(error)


def _judge_lora(found: Verdict, config: Lora) -> None:
    pairs: dict[str, dict[str, Tensor]] = {}
    magnitudes = set()
    for key, tensor in found.tensors.items():
        match = _PAIR.fullmatch(key)
        if config.dora and key.endswith(_MAGNITUDE):
            magnitudes.add(key.removesuffix(_MAGNITUDE).removeprefix(PREFIX))
        elif match is not None and bool(match["embedding"]) != bool(match["end"]):
            pairs.setdefault(match["path"].removeprefix(PREFIX), {})[match["half"]] = tensor
        elif _BESIDE.fullmatch(key) is None:
            found.fault(f"{key} is no part of LoRA")
    for path, pair in pairs.items():
        ranks, parameter = _ranks(path, config)
        if config.dora and path not in magnitudes:
            found.fault(f"{path} has no lora_magnitude_vector, but the config says use_dora")
        for half, other in ("AB", "BA"):
            if half not in pair:
                found.fault(f"{path} has no lora_{half} beside its lora_{other}")
            elif pair[half].dim() != 2 or not _is_of_rank(pair[half].shape["AB".index(half)], ranks, parameter):
                found.fault(
                    f"lora_{half} {list(pair[half].shape)} of {path} is not of rank {' or '.join(map(str, ranks))}"
                    f"{' for each expert' if parameter else ''}, which the config says"
                )
            elif not pair[half].is_floating_point():
                found.fault(f"lora_{half} of {path} is {pair[half].dtype}, expected floating point")
    ups = [pair["B"] for pair in pairs.values() if "B" in pair]
    if ups and not any(up.any() for up in ups):
        found.notes.append("every lora_B is zero: it has not been trained and does nothing")
    if any(map(is_apart, found.tensors)):
        found.notes.append("layers of each expert are adapted; load and a bank stack them where a model's are stacked")


def _ranks(path: str, config: Lora) -> tuple[list[int], bool]:
    """The ranks that a pair may have, and whether it is for a parameter: which one of its module's, the model knows."""
    module = path
    while module.endswith(".base_layer"):
        module = module.removesuffix(".base_layer")
    named = config.experts if isinstance(config.experts, tuple) else ()
    ends = (name.rpartition(".") for name in named)
    parameters = [end for where, _, end in ends if not where or ends_with(module, (where,))]
    if not parameters or (module == path and config.targets != ALL_LINEAR and means(path, config)):
        return [config.rank_of(path)], False
    return sorted({config.rank_of(f"{module}.{parameter}") for parameter in parameters}), True


def _is_of_rank(size: int, ranks: list[int], parameter: bool) -> bool:
    return any(size and size % rank == 0 if parameter else size == rank for rank in ranks)


def _judge_prompt(found: Verdict, length: int) -> None:
    table = found.tensors.get(EMBEDDINGS)
    if not found.tensors:
        return
    if table is None:
        found.fault(f"it has {', '.join(sorted(found.tensors)[:3])}, expected {EMBEDDINGS}")
    elif table.dim() != 2 or table.shape[0] != length:
        found.fault(f"{EMBEDDINGS} is {list(table.shape)}, the config says {length} virtual tokens")
    for key in found.tensors:
        if key != EMBEDDINGS and not key.endswith((".weight", ".bias")):  # of the model's embedding and head
            found.fault(f"{key} is no part of {found.kind}")


def _judge_selection(found: Verdict) -> None:
    word = {TOKENS: DELTA, NORMS: NORM}.get(found.fields["peft_type"])
    if word is not None and found.tensors and not any(word in key.split(".") for key in found.tensors):
        found.fault(f"it has {', '.join(sorted(found.tensors)[:3])}, expected {word}")
    ids = found.fields.get("token_indices")
    for key, rows in found.tensors.items():
        if word == DELTA and isinstance(ids, list) and key.endswith(DELTA) and len(rows) != len(ids):
            found.fault(f"{key} has {len(rows)} rows, the config {len(ids)} token_indices")


def _judge_bottleneck(found: Verdict) -> None:
    own = found.format == "fastpeft"
    downs, ups = (set(_projections(found.tensors, own, word)) for word in ("down", "up"))
    if not downs | ups:
        found.fault("it holds no adapter")
    for path in sorted(downs ^ ups):
        found.fault(f"{path} has one of its projections down and up without the other")


def _projections(tensors: Mapping[str, Tensor], own: bool, word: str) -> Iterator[str]:
    for key, tensor in tensors.items():
        if own and key.endswith(f".{word}_weight"):
            yield key.removesuffix(f".{word}_weight")
        elif not own and f".adapter_{word}." in key and key.endswith(".weight") and tensor.dim() == 2:
            yield key.partition(f".adapter_{word}.")[0]


def _judge_values(found: Verdict) -> None:
    bad = [key for key, t in found.tensors.items() if t.is_floating_point() and not torch.isfinite(t).all()]
    for key in bad[:8]:
        found.fault(f"{key} has values that are not finite")
