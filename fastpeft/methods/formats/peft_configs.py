"""Configs of PEFT's that stand for configs of ours, known by their fields, so that PEFT need not be there."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ...nn.base_layer import not_adaptable_reason
from ..embeddings import input_embeddings, output_embeddings, tied_to_embeddings
from ..lora.config import ALL_LINEAR, Lora
from ..prefix.config import PrefixTuning
from ..prompt.config import PromptTuning
from ..selective.config import Selective
from ..targets import names as means
from ..targets import walk
from .peft_format import FRESH_INITS, from_peft
from .peft_prompts import check_fields

_PROMPT_INITS = {"RANDOM": "random", "SAMPLE_VOCAB": "vocabulary"}
# The heads that PEFT's models of these tasks train beside any adapter, where the model has them.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
_COMMON = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision"),
    *("runtime_config", "task_type"),
}


def is_peft_config(config: object) -> bool:
    """Whether this is a config of PEFT's, of any kind."""
    return hasattr(config, "peft_type") and callable(getattr(config, "to_dict", None))


def translated(op: str, model: nn.Module, config: Any) -> list[Any]:
    """Our configs, which together are one adapter, for one of PEFT's.

    Args:
        op: The function to name in errors.
        model: The model that they are for: PEFT trains the head of a model for classification too.
        config: What ``is_peft_config`` knows.

    Raises:
        ValueError: It is of a kind, or asks for something, that is not served here.
    """
    source, fields = f"peft.{type(config).__name__}", _plain(config.to_dict())
    kind = str(fields.get("peft_type"))
    if kind not in _KINDS:
        raise ValueError(f"{op}: config is {source}, which is not served, expected one for {', '.join(_KINDS)}")
    heads = _HEADS.get(str(fields.get("task_type")), ())
    paths = [path for path, _ in walk(model)]
    heads = tuple(head for head in heads if any(path == head or path.endswith(f".{head}") for path in paths))
    configs = _KINDS[kind](op, source, fields, heads)
    return [_as_in_peft(op, source, model, fields, part) if isinstance(part, Lora) else part for part in configs]


def _as_in_peft(op: str, source: str, model: nn.Module, fields: Mapping, config: Lora) -> Lora:
    """What in PEFT's config depends on the model."""
    if fields.get("ensure_weight_tying") and (tied := tied_to_embeddings(model)):
        table = next(path for path, module in walk(model) if module is input_embeddings(model))
        if any(means(path, config) or path.endswith(tuple(config.modules_to_save)) for path in (table, *tied)):
            raise ValueError(f"{op}: {source} has ensure_weight_tying=True beside {table}, which is not served")
    if config.targets == ALL_LINEAR and fields.get("task_type") != "SEQ_CLS" and output_embeddings(model) is None:
        # Only for SEQ_CLS does PEFT leave the head of a classifier out.
        return dataclasses.replace(config, targets=[p for p, m in walk(model) if p and not_adaptable_reason(m) is None])
    return config


def _lora(op: str, source: str, fields: dict, heads: tuple[str, ...]) -> list[Any]:
    if fields.get("target_modules") is None and not fields.get("target_parameters"):
        raise ValueError(f"{op}: {source} has target_modules=None, expected names or 'all-linear'")
    init = fields.get("init_lora_weights", True)
    if init not in FRESH_INITS:
        expected = ", ".join(map(repr, FRESH_INITS))
        raise ValueError(f"{op}: {source} has init_lora_weights={init!r}, expected one of {expected}")
    tokens = fields.pop("trainable_token_indices", None)
    saved = [name for name in fields.get("modules_to_save") or () if name not in heads]
    lora = from_peft(op, {**fields, "modules_to_save": [*saved, *heads] or None}, source)
    lora = dataclasses.replace(lora, experts=lora.experts or True)
    return [lora, Selective(tokens=tokens)] if tokens else [lora]


def _prompt(op: str, source: str, fields: dict, heads: tuple[str, ...]) -> list[Any]:
    length, init = check_fields(op, fields, source), str(fields.get("prompt_tuning_init", "RANDOM"))
    _refuse_heads(op, source, heads)
    if init not in _PROMPT_INITS:
        raise ValueError(
            f"{op}: {source} has prompt_tuning_init={init!r}, expected one of {', '.join(_PROMPT_INITS)}; from a text: "
            "fastpeft.PromptTuning(init='text', text=tokenizer(...).input_ids)"
        )
    return [PromptTuning(length=length, init=_PROMPT_INITS[init])]


def _prefix(op: str, source: str, fields: dict, heads: tuple[str, ...]) -> list[Any]:
    length = check_fields(op, fields, source)
    _refuse_heads(op, source, heads)
    if not fields.get("prefix_projection"):
        return [PrefixTuning(length=length)]
    if fields.get("encoder_hidden_size") is None:
        raise ValueError(f"{op}: {source} has encoder_hidden_size=None, expected the hidden units of its projection")
    return [PrefixTuning(length=length, projection=fields["encoder_hidden_size"])]


def _norms(op: str, source: str, fields: dict, heads: tuple[str, ...]) -> list[Any]:
    _refuse_rest(op, source, fields, {"target_modules", "modules_to_save"})
    names = fields.get("target_modules")
    if names is None:
        raise ValueError(f"{op}: {source} has target_modules=None, expected names of normalisation layers")
    names = [names] if isinstance(names, str) else list(names)
    return [Selective(modules=[*names, *(fields.get("modules_to_save") or ()), *heads])]


def _tokens(op: str, source: str, fields: dict, heads: tuple[str, ...]) -> list[Any]:
    _refuse_rest(op, source, fields, {"target_modules", "token_indices", "init_weights"})
    _refuse_heads(op, source, heads)
    names, ids = fields.get("target_modules"), fields["token_indices"]
    names = [names] if isinstance(names, str) else names
    return [Selective(tokens=ids if names is None else dict.fromkeys(names, ids))]


# By peft_type; each gets the fields and the heads that the task adds.
_KINDS: dict[str, Callable[[str, str, dict, tuple[str, ...]], list[Any]]] = {
    "LORA": _lora,
    "PROMPT_TUNING": _prompt,
    "PREFIX_TUNING": _prefix,
    "LN_TUNING": _norms,
    "TRAINABLE_TOKENS": _tokens,
}


def _plain(fields: Mapping) -> dict:
    """As JSON would hold them: enumerations' values, lists for sets."""
    found = {name: getattr(value, "value", value) for name, value in fields.items()}
    return {name: sorted(value) if isinstance(value, set) else value for name, value in found.items()}


def _refuse_rest(op: str, source: str, fields: Mapping, served: set[str]) -> None:
    for name, value in fields.items():
        if value and name not in served | _COMMON:
            raise ValueError(f"{op}: {source} has {name}={value!r}, which is not served")


def _refuse_heads(op: str, source: str, heads: tuple[str, ...]) -> None:
    """PEFT trains these beside the adapter; what we have for it would train no head without a word."""
    if heads:
        raise ValueError(
            f"{op}: {source} is for a task whose head ({', '.join(heads)}) PEFT trains too, expected a list: "
            f"the config without task_type and fastpeft.Selective(modules={list(heads)})"
        )
