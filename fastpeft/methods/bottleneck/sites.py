"""Where bottleneck adapters go: after the attention, the MLP or the cross-attention of every layer of a known family,
or at the modules that a rule means. Reads the model, never changes it.

A family is known by the names of a layer's children, so that a new model of the same build needs nothing.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...nn.read_past import read_past
from ..own import own_modules
from .config import Bottleneck


@dataclass(frozen=True)
class Site:
    """One place for an adapter.

    Attributes:
        place: "attention", "mlp", "cross", or "rule". layer: its number, counted over the whole model.
        path: of the module whose (first) output h is the sub-block's contribution.
        stream: of the module whose first input is X, the stream that h will be added to; None with ``norm``.
        norm: of the LayerNorm that normalises h + X, in models that do so after the sub-block; its parent's forward
            is ``norm(dropout(dense(.)) + X)`` with X as second argument.
        hub: where AdapterHub's library keeps the adapters; None where it has none.
        features: K.
    """

    place: str
    layer: int | None
    path: str
    features: int
    stream: str | None = None
    norm: str | None = None
    hub: str | None = None


# Children that a layer has, "!" before those that it must not have: (place, h, stream, holder of AdapterHub).
_PRE_NORM = {
    ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm", "!post_feedforward_layernorm"): (
        ("attention", "self_attn", "input_layernorm", "attention_adapters"),
        ("mlp", "mlp", "post_attention_layernorm", "output_adapters"),
    ),
    ("attn", "mlp", "ln_1", "ln_2"): (
        ("attention", "attn", "ln_1", "attention_adapters"),
        ("cross", "crossattention", "ln_cross_attn", None),
        ("mlp", "mlp", "ln_2", "output_adapters"),
    ),
    ("attention", "mlp", "layernorm_before", "layernorm_after"): (
        ("attention", "attention", "layernorm_before", "attention_adapters"),
        ("mlp", "mlp", "layernorm_after", "output.output_adapters"),
    ),
    ("attention", "intermediate", "output", "layernorm_before", "layernorm_after"): (
        ("attention", "attention", "layernorm_before", "attention_adapters"),
        ("mlp", "output.dropout", "layernorm_after", "output.output_adapters"),
    ),
}
_POST_NORM = ("attention", "intermediate", "output")
_POST_NORM_PARTS = (("attention", "attention.output"), ("cross", "crossattention.output"), ("mlp", "output"))
_T5_PARTS = {"SelfAttention": "attention", "EncDecAttention": "cross", "DenseReluDense": "mlp"}
_NUMBER = re.compile(r"(.*?\.)?(layers|layer|block|h|blocks)\.\d+")


def sites(op: str, model: nn.Module, config: Bottleneck) -> list[Site]:
    """Where this config means, in the model's order.

    Raises:
        ValueError: nothing is meant, with what would be; or a width cannot be read off.
    """
    modules = own_modules(model)
    if config.targets is not None:
        return list(_by_rule(op, modules, config, read_past(model)))
    found = list(known_sites(model))
    if not found:
        raise ValueError(
            f"{op}: {type(model).__name__} has no layers built like those of Llama, BERT, GPT-2, T5 or ViT; say which "
            "modules adapters follow: Bottleneck(targets=[...])"
        )
    places = tuple(config.places or ())
    kept = [site for site in found if site.place in places and site.layer not in config.leave_out]
    if not kept:
        there = ", ".join(dict.fromkeys(site.place for site in found))
        raise ValueError(
            f"{op}: places={list(places)} without layers {list(config.leave_out)} matches nothing in "
            f"{type(model).__name__}, which has {there} in {len({s.layer for s in found})} layers"
        )
    count = 1 + max(site.layer for site in found if site.layer is not None)
    beyond = [layer for layer in config.leave_out if layer >= count]
    if beyond:
        raise ValueError(f"{op}: leave_out has {beyond[0]}, expected layer numbers below {count}")
    return kept


def known_sites(model: nn.Module) -> Iterator[Site]:
    """All sites in layers of the known families."""
    modules = own_modules(model)
    layers: dict[str, int] = {}
    for path, module in modules.items():
        children = module._modules
        rule = next((r for names, r in _PRE_NORM.items() if _built_like(children, names)), None)
        part = next((part for name, part in _T5_PARTS.items() if name in children and "layer_norm" in children), None)
        if rule is None and part is None and not _is_post_norm(path, modules):
            continue
        number = layers.setdefault(_layer_path(path), len(layers))
        inside = f"{path}." if path else ""
        if part is not None:
            yield _site(modules, part, number, f"{inside}dropout", stream=f"{inside}layer_norm", hub=path)
        elif rule is not None:
            for place, h, stream, hub in rule:
                if f"{inside}{h}" in modules and f"{inside}{stream}" in modules:
                    hub = None if hub is None else _old_name(inside, children) + hub
                    yield _site(modules, place, number, f"{inside}{h}", stream=f"{inside}{stream}", hub=hub)
        else:
            for place, part in _POST_NORM_PARTS:
                if f"{inside}{part}.LayerNorm" in modules:
                    norm = f"{inside}{part}.LayerNorm"
                    yield _site(modules, place, number, f"{inside}{part}.dropout", norm=norm, hub=f"{inside}{part}")


def _site(modules: dict, place: str, layer: int, path: str, stream=None, norm=None, hub=None) -> Site:
    return Site(place, layer, path, modules[stream or norm].weight.shape[0], stream, norm, hub)


def _built_like(children: dict, names: tuple[str, ...]) -> bool:
    return all(name[1:] not in children if name[0] == "!" else name in children for name in names)


def _is_post_norm(path: str, modules: dict) -> bool:
    inside = f"{path}." if path else ""
    parts = [f"{inside}{part}.{name}" for part in ("attention.output", "output") for name in ("dropout", "LayerNorm")]
    return all(f"{inside}{name}" in modules for name in _POST_NORM) and all(part in modules for part in parts)


def _layer_path(path: str) -> str:
    match = _NUMBER.match(path)
    return match[0] if match else path


def _old_name(inside: str, children: dict) -> str:
    """Where transformers 4, which AdapterHub's library is pinned to, has a layer that transformers 5 renamed."""
    if "layernorm_before" not in children or "intermediate" in children:
        return inside
    return re.sub(r"(^|\.)layers\.(\d+)\.$", r"\1encoder.layer.\2.", inside)


def _by_rule(op: str, modules: dict[str, nn.Module], config: Bottleneck, passed: dict[str, str]) -> Iterator[Site]:
    targets: Any = config.targets
    if callable(targets):
        meant = [path for path, module in modules.items() if path and targets(path, module)]
    elif isinstance(targets, str):
        meant = [path for path in modules if path and re.fullmatch(targets, path)]
    else:
        meant = [p for p in modules if any(p == name or p.endswith(f".{name}") for name in targets)]
    if not meant:
        shown = "a function" if callable(targets) else repr(targets if isinstance(targets, str) else list(targets))
        names = [path.rpartition(".")[2] for path in modules if path]
        near = ", ".join(list(dict.fromkeys(name for name in names if not name.isdecimal()))[:12])
        raise ValueError(f"{op}: targets={shown} matches no module, expected some of {near}")
    for path in meant:
        if type(modules[path]).forward is nn.Module.forward:
            raise ValueError(f"{op}: targets names {path}, a {type(modules[path]).__name__}, which is never called")
        if path in passed:
            raise ValueError(f"{op}: targets names {path}, which is {passed[path]}, expected a module that is called")
        features = config.features or _width(modules[path])
        if features is None:
            raise ValueError(
                f"{op}: the width of {path}, a {type(modules[path]).__name__}, cannot be read off; give features"
            )
        yield Site("rule", None, path, features)


def _width(module: nn.Module) -> int | None:
    """Of a module's output: its own, else that of the last layer inside that has one."""
    for candidate in (module, *reversed(list(module.modules()))):
        for name in ("out_features", "nf", "embedding_dim"):
            if isinstance(getattr(candidate, name, None), int):
                return getattr(candidate, name)
        shape = getattr(candidate, "normalized_shape", None)
        if shape:
            return shape[-1]
    return None
