"""Adapters of experts that were modules of their own, for a model that keeps all of a layer's in one parameter.

Before transformers 5 an expert had linear layers, and a checkpoint a pair for each of them: ``experts.3.gate_proj``.
Now gate and up stand one above the other in ``gate_up_proj [experts, out, in]``. Its pair has the sum of their ranks,

    A = [A_gate; A_up]        B = [[B_gate, 0], [0, B_up]]        for every expert,

and the same scale, so ``scale · B A`` is what it was: values are put in other places and zeros beside them.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...nn.base_layer import not_adaptable_reason
from ...nn.experts_call import layout_of
from ...nn.experts_weights import sizes
from ..targets import walk
from .config import Lora
from .experts import base_of, is_experts, keys_of, target_parameters

_PAIR = re.compile(r"(?P<path>.+)\.(?P<expert>\d+)\.(?P<layer>\w+)\.lora_(?P<half>[AB])\.weight")
# What the layers in a parameter were called, in its order.
_LAYERS = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "up_proj": (("up_proj",),),
    "down_proj": (("down_proj",), ("w2",)),
}
_MOVED = ".block_sparse_moe.", ".mlp."  # Mixtral's

Pairs = dict[tuple[str, int, str], Tensor]  # by layer, expert and half


class _Stacked(NamedTuple):
    lora_a: Tensor
    lora_b: Tensor
    rank: int
    alpha: float


def stacked(op: str, model: nn.Module, config: Lora, tensors: dict[str, Tensor]) -> tuple[Lora, dict[str, Tensor]]:
    """The config and tensors of an adapter, by the model's own modules, with what was apart put together.

    Args:
        op: The function to name in errors.
        model: Which the adapter is for; experts that are modules in it too are left as they are.
        config: The adapter's.
        tensors: Without PEFT's prefix.

    Raises:
        ValueError: Some experts of a layer have no adapter, gate has none where up has one or the other way round, or
            their ranks or scales differ, so that no pair of the parameter says the same.
    """
    modules: Mapping[str, Any] = dict(walk(model))
    rest: dict[str, Tensor] = {}
    apart: dict[str, Pairs] = {}
    was: dict[str, str] = {}
    for key, tensor in tensors.items():
        match = _PAIR.fullmatch(key)
        path = None if match is None else _here(modules, match["path"])
        if match is None or path is None or not is_experts(base_of(modules[path])):
            rest[key] = tensor
        else:
            apart.setdefault(path, {})[match["layer"], int(match["expert"]), match["half"]] = tensor
            was[path] = match["path"]
    if not apart:
        return config, tensors
    rest = {_now(modules, key): tensor for key, tensor in rest.items()}
    made = {path: _parameters(op, was[path], base_of(modules[path]), config, pairs) for path, pairs in apart.items()}
    for path, parameters in made.items():
        for parameter, key in keys_of(path, list(parameters)).items():
            pair = parameters[parameter]
            rest |= {f"{key}.lora_A.weight": pair.lora_a, f"{key}.lora_B.weight": pair.lora_b}
    routers = dict.fromkeys(_routers(modules, rest), ("weight",))
    wholes = {f"{path}.{name}": pair for path, of in made.items() for name, pair in of.items()}
    changed: dict[str, Any] = {
        "experts": target_parameters(model, {path: tuple(of) for path, of in made.items()} | routers),
        "rank_pattern": _patterns({path: pair.rank for path, pair in wholes.items()}) | dict(config.rank_pattern),
        "alpha_pattern": _patterns({path: pair.alpha for path, pair in wholes.items()}) | dict(config.alpha_pattern),
    }
    return dataclasses.replace(config, **changed), rest


def is_apart(key: str) -> bool:
    """Whether a checkpoint's key is that of one expert's layer.

    Args:
        key: Of a tensor.
    """
    match = _PAIR.fullmatch(key)
    return match is not None and match["path"].endswith("experts")


def _here(modules: Mapping[str, Any], path: str) -> str | None:
    """Where the model has the module that was at ``path``, or None."""
    return next((known for known in (path, path.replace(*_MOVED)) if known in modules), None)


def _now(modules: Mapping[str, Any], key: str) -> str:
    path, _, end = key.rpartition(".lora_")
    moved = _here(modules, path)
    return f"{moved}.lora_{end}" if path and moved is not None else key


def _routers(modules: Mapping[str, Any], tensors: Iterable[str]) -> list[str]:
    """Adapted modules that have a matrix and are no linear layer any more."""
    paths = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    return [path for path in paths if path in modules and _is_router(base_of(modules[path]))]


def _is_router(base: Any) -> bool:
    weight = base._parameters.get("weight")
    return weight is not None and weight.dim() == 2 and not_adaptable_reason(base) is not None


def _parameters(op: str, path: str, base: Any, config: Lora, pairs: Pairs) -> dict[str, _Stacked]:
    """The pair of each parameter of an experts module, in the module's order."""
    layout = layout_of(base)
    if isinstance(layout, str) or layout.transposed or not getattr(base, "is_concatenated", True):
        why = layout if isinstance(layout, str) else f"{type(base).__name__} keeps its weights another way round"
        raise ValueError(f"{op}: {path} has an adapter for each expert's layers, which cannot be stacked: {why}")
    there, last = {layer for layer, _, _ in pairs}, max(expert for _, expert, _ in pairs)
    count, _, _ = sizes(base, layout.down)
    if last >= count:
        raise ValueError(f"{op}: the checkpoint is for another model: it has {path}.{last}, the model {count} experts")
    found = {}
    for parameter in (name for name in base._parameters if name in (layout.up, layout.down)):
        layers = next((known for known in _LAYERS[parameter] if there & {*known}), ())
        if layers:
            found[parameter] = _stack(op, path, base, parameter, layers, config, pairs)
            there -= {*layers}
    if there:
        raise ValueError(f"{op}: {path} has adapters of {', '.join(sorted(there))}, expected layers of {layout[:2]}")
    return found


def _stack(
    op: str, path: str, base: Any, parameter: str, layers: tuple[str, ...], config: Lora, pairs: Pairs
) -> _Stacked:
    count, k, n = sizes(base, parameter)
    wanted = [(layer, expert, half) for layer in layers for expert in range(count) for half in "AB"]
    for layer, expert, half in (part for part in wanted if part not in pairs):
        text = f"no lora_{half} of {path}.{expert}.{layer}, expected one of every expert"
        raise ValueError(f"{op}: the checkpoint has {text}, since {parameter} is one parameter in this model")
    ranks, scales = [], set()
    for layer in layers:
        of = [f"{path}.{expert}.{layer}" for expert in range(count)]
        numbers = {(config.rank_of(one), config.alpha_of(one)) for one in of}
        if len(numbers) > 1:
            raise ValueError(
                f"{op}: r and alpha of {path}'s {layer} are {sorted(numbers)}, expected those of one expert"
            )
        ((r, alpha),) = numbers
        ranks.append(r)
        scales.add(alpha / (math.sqrt(r) if config.rslora else r))
        for expert, half in ((expert, half) for expert in range(count) for half in "AB"):
            shape, given = (r, k) if half == "A" else (n // len(layers), r), pairs[layer, expert, half].shape
            if tuple(given) != shape:
                text = f"lora_{half} {list(given)} of {path}.{expert}.{layer}, expected {list(shape)}"
                raise ValueError(f"{op}: the checkpoint is for another model: it has {text}")
    if len(scales) > 1:
        raise ValueError(f"{op}: {' and '.join(layers)} of {path} have scales {sorted(scales)}, expected one for both")
    rank = sum(ranks)
    a = torch.cat([torch.stack([pairs[layer, e, "A"] for e in range(count)]) for layer in layers], 1)
    b = torch.stack([torch.block_diag(*(pairs[layer, e, "B"] for layer in layers)) for e in range(count)])
    share = rank / r  # of the last layer's, which has the scale of all
    alpha *= math.sqrt(share) if config.rslora else share
    return _Stacked(a.flatten(0, 1), b.permute(1, 2, 0).reshape(n, rank * count), rank, alpha)


def _patterns(of: Mapping[str, Any]) -> dict[str, Any]:
    """A pattern for each parameter's path: its end, where all with that end have the same."""
    ends = {path: ".".join(path.split(".")[-2:]) for path in of}
    values = {end: {of[path] for path in of if ends[path] == end} for end in {*ends.values()}}
    return {re.escape(end if len(values[end]) == 1 else path): of[path] for path, end in ends.items()}
