"""Which modules of a model a config means. Reads the model, never changes it; the rules are PEFT's.

A model that has been attached to is read as it was: a ``LoraLinear`` stands for its base layer, a ``TrainedCopy`` for
its original.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

from torch import nn

from ..nn.base_layer import is_conv1d, not_adaptable_reason
from ..nn.lora import LoraLinear
from ..nn.lora_embedding import LoraEmbedding, no_lora_embedding_reason
from ..nn.lora_experts import LoraExperts
from ..nn.protocol import is_added, original_child
from ..nn.read_past import read_past
from .embeddings import output_embeddings
from .lora.config import ALL_LINEAR, Lora

_HEADS = ("score", "classifier")
_CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)


@dataclass(frozen=True)
class Targets:
    """Paths to adapt and paths to copy, in the model's order; of experts, the names of the adapted parameters too."""

    linears: tuple[str, ...]
    copies: tuple[str, ...]
    experts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def walk(model: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of the model as it was before anything was attached, every module once.

    Where another module stands for the original, that module is yielded at the original's path, and nothing of what is
    inside; what was added is not.
    """
    return _walk(model, path, set())


def _walk(module: nn.Module, path: str, seen: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    if module in seen or is_added(module):
        return
    seen.add(module)
    yield path, module
    if original_child(module) is not None:
        return
    for name, inner in module._modules.items():
        if inner is not None:
            yield from _walk(inner, f"{path}.{name}" if path else name, seen)


def resolve(
    op: str, model: nn.Module, config: Lora, strict: bool = True, experts: Mapping[str, tuple[str, ...]] | None = None
) -> Targets:
    """The modules that ``config`` means.

    Args:
        experts: those that it means already (``lora.experts``), which are left out where they are copied.
        strict: every name in modules_to_save and every pattern must match something; a checkpoint's need not.

    Raises:
        ValueError: nothing matches (with the names of linear layers that are there), or a name in modules_to_save or
            a pattern matches nothing, or a named module cannot be copied.
        TypeError: a module that was named is no plain linear layer and no embedding, or its weight is read past its
            forward; a checkpoint may name such a layer, which then has as little effect as it has in PEFT.
    """
    modules = dict(walk(model))
    passed = read_past(model) if strict or config.targets == ALL_LINEAR else {}
    _refuse_foreign_adapters(op, modules)
    copies = _copies(op, modules, config)
    kept = {p: n for p, n in (experts or {}).items() if not any(_within(p, copy) for copy in copies)}
    skipped = (*(_head_paths(model, modules) if config.targets == ALL_LINEAR else ()), *copies)
    linears = []
    for path, module in modules.items():
        reason = _not_linear(module)
        if reason is None or _is_embedding(module):
            reason = passed.get(path, reason)
        if path in kept or any(_within(path, skip) for skip in skipped) or not _named(path, reason, config):
            continue
        if reason is not None and (path in passed or not _is_embedding(module)):
            given = f"targets names {path or 'the model'}, which is {reason}"
            expected = "a layer that is called" if path in passed else "nn.Linear, Conv1D or nn.Embedding"
            raise TypeError(f"{op}: {given}, expected {expected}")
        if path == "":
            raise ValueError(f"{op}: model is itself the layer to adapt, expected a model around it: use LoraLinear")
        linears.append(path)
    if not linears and not kept:
        raise ValueError(
            f"{op}: targets={_short(config.targets)} matches no module of {type(model).__name__}, "
            f"expected some of {_candidates(modules)}"
        )
    if strict:
        parameters = (f"{path}.{name}" for path, names in kept.items() for name in names)
        _check_all_used(op, [*linears, *parameters], copies, config)
    return Targets(tuple(linears), copies, kept)


def _not_linear(module: nn.Module) -> str | None:
    """Why "all-linear" does not mean this module, or None."""
    if isinstance(module, LoraEmbedding):
        return "an Embedding"
    if isinstance(module, LoraExperts):
        return "an experts module"
    return None if isinstance(module, LoraLinear) else not_adaptable_reason(module)


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(module, LoraEmbedding) or no_lora_embedding_reason(module) is None


def names(path: str, config: Lora) -> bool:
    """Whether the config's targets mean ``path``, whatever module is there; "all-linear" means every path."""
    return _named(path, None, config)


def excluded(path: str, config: Lora) -> bool:
    """Whether the config leaves ``path`` out."""
    exclude = config.exclude
    if not exclude:
        return False
    return bool(re.fullmatch(exclude, path)) if isinstance(exclude, str) else ends_with(path, exclude)


def _named(path: str, reason: str | None, config: Lora) -> bool:
    targets = config.targets
    if excluded(path, config):
        return False
    if targets == ALL_LINEAR:
        return reason is None and path != ""
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    return path in targets or (ends_with(path, targets) and _in_layers(path, config))  # a whole path is in any layer


def ends_with(path: str, names: Iterable[str]) -> bool:
    """Whether one of the names is the path or its end, from a dot on."""
    return any(path == name or path.endswith(f".{name}") for name in names)


def _in_layers(path: str, config: Lora) -> bool:
    if config.layers is None:
        return True
    patterns = config.layers_pattern or ()
    patterns = (patterns,) if isinstance(patterns, str) else patterns
    tries = [rf"(?:^|.*?\.){pattern}\.(?P<i>\d+)\." for pattern in patterns] or [r".*?\.[^.]*\.(?P<i>\d+)\."]
    match = next(filter(None, (re.match(pattern, path) for pattern in tries)), None)
    return match is not None and int(match["i"]) in cast(tuple, config.layers)


def _copies(op: str, modules: dict[str, nn.Module], config: Lora) -> tuple[str, ...]:
    copies: list[str] = []
    for path, module in modules.items():
        if not path or not any(path.endswith(name) for name in config.modules_to_save):
            continue
        if copies and path.startswith(f"{copies[-1]}."):
            continue
        if isinstance(module, _CONTAINERS):
            raise ValueError(
                f"{op}: modules_to_save names {path}, a {type(module).__name__}, expected a module that is called"
            )
        adapted = [name for name, inner in modules.items() if isinstance(inner, LoraLinear) and _within(name, path)]
        if adapted:
            raise ValueError(f"{op}: modules_to_save names {path}, but {adapted[0]} has an adapter already")
        copies.append(path)
    return tuple(copies)


def _within(path: str, parent: str) -> bool:
    return path == parent or path.startswith(f"{parent}.")


def _head_paths(model: nn.Module, modules: dict[str, nn.Module]) -> tuple[str, ...]:
    """The output head of a Hugging Face model: its output embeddings, else the head of a classifier."""
    if not hasattr(model, "get_output_embeddings"):
        return ()
    head = output_embeddings(model)
    if head is None:
        head = next(
            (getattr(model, name) for name in _HEADS if isinstance(getattr(model, name, None), nn.Module)), None
        )
    return tuple(path for path, module in modules.items() if head is not None and module is head)


def _refuse_foreign_adapters(op: str, modules: dict[str, nn.Module]) -> None:
    for path, module in modules.items():
        if not isinstance(module, LoraLinear) and hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            raise ValueError(
                f"{op}: {path} is a LoRA layer of PEFT, expected a plain model; for PEFT use fastpeft.accelerate"
            )


def _check_all_used(op: str, linears: list[str], copies: tuple[str, ...], config: Lora) -> None:
    for name in config.modules_to_save:
        if not any(path.endswith(name) for path in copies):
            raise ValueError(f"{op}: modules_to_save names {name!r}, which no path of the model ends with")
    for name in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, name):
            if not any(re.match(rf"(.*\.)?({pattern})$", path) for path in linears):
                raise ValueError(f"{op}: {name} has {pattern!r}, which matches no adapted layer")


def _candidates(modules: dict[str, nn.Module], count: int = 8) -> str:
    linear = (p for p, m in modules.items() if _not_linear(m) is None)
    names = list(dict.fromkeys(path.rpartition(".")[2] for path in linear if path))
    if not names:
        kinds = sorted({type(m).__name__ for m in modules.values() if isinstance(m, nn.Linear) or is_conv1d(m)})
        return (
            f"an nn.Linear or Conv1D, of which it has none (but {', '.join(kinds)})"
            if kinds
            else "an nn.Linear, of which it has none"
        )
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def _short(targets: str | Sequence[str]) -> str:
    text = repr(targets if isinstance(targets, str) else list(targets))
    return text if len(text) < 200 else f"{text[:197]}..."
