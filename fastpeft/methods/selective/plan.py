"""What a ``Selective`` config means on a model. Reads the model, never changes it."""

import random
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ...nn.base_layer import is_conv1d, not_linear_reason
from ...nn.branch import own_path_reason
from ...nn.live_slice import index_of
from ...nn.read_past import read_past
from ...nn.token_rows import no_embedding_reason
from ..attachment import owners
from ..claims import Claims
from ..embeddings import input_embeddings, output_embeddings
from ..own import innermost, own_modules, own_parameters
from ..placement import check_values
from .blocks import blocks_of, chosen, near
from .config import Selective


@dataclass(frozen=True)
class Slice:
    """Rows or columns of a linear layer, or tokens of an embedding and of the layers tied to it: heads, embeddings."""

    path: str
    kind: str  # rows, columns or tokens
    index: Tensor
    tied: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        return f"{self.path}.{self.kind}"


@dataclass
class Plan:
    """What is trained: whole parameters by name, with the selector that meant them; new biases; slices."""

    whole: dict[str, str] = field(default_factory=dict)
    biases: list[str] = field(default_factory=list)
    slices: list[Slice] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def explicit(self) -> Selective:
        """The config that means exactly this on any model with these names."""
        by_kind: dict[str, Any] = {
            k: {s.path: s.index.tolist() for s in self.slices if s.kind == k} for k in ("rows", "columns", "tokens")
        }
        return Selective(params=list(self.whole), add_missing_bias=self.biases or False, **by_kind)

    def claims(self) -> Claims:
        """The weights that it trains, or rows of them."""
        return frozenset({*self.whole, *(f"{p}.bias" for p in self.biases), *(f"{s.path}.weight" for s in self.slices)})


def resolve(op: str, model: nn.Module, config: Selective) -> Plan:
    """Find and check everything; raises whatever can be wrong and touches nothing.

    Raises:
        ValueError: a selector matches nothing (with near misses), or two of them mean the same weight.
        TypeError: a module that was named cannot be sliced.
    """
    parameters, modules, plan = own_parameters(model), own_modules(model), Plan()
    scope = None
    if config.layers is not None:
        paths = chosen(op, config.layers, blocks_of(op, model, config.blocks))
        scope = tuple(f"{path}." for path in paths)
        if not config.within:
            plan.whole.update((name, "layers") for name in parameters if name.startswith(scope))

    def in_scope(name: str) -> bool:
        return scope is None or name.startswith(scope)

    for word in config.params:
        found = [name for name in _named(word, parameters, modules) if in_scope(name)]
        if not found and not (word == "bias" and config.add_missing_bias):
            where = "" if scope is None else f" in layers={config.layers!r}"
            raise ValueError(f"{op}: params has {word!r}, {_no_parameter(word, where, parameters)}")
        plan.whole.update((name, word if word in ("bias", "norm") else "params") for name in found)
    _add_modules(op, config, parameters, modules, plan)
    passed = read_past(model) if config.rows or config.columns or config.tokens or config.add_missing_bias else {}
    _add_biases(op, config, model, modules, passed, in_scope, plan)
    for kind in ("rows", "columns"):
        for pattern, part in getattr(config, kind).items():
            plan.slices += _slices(op, kind, pattern, part, config.seed, modules, passed, in_scope)
    _add_tokens(op, config, model, modules, passed, plan)
    _check_disjoint(op, parameters, modules, plan)
    _note_ties(model, plan)
    check_values(op, model, [*plan.whole, *plan.biases, *(part.path for part in plan.slices)], added=False)
    empty = next((name for name in plan.whole if parameters[name].is_meta), None)
    if empty is not None:
        raise ValueError(f"{op}: {empty} is on the meta device, without values to start from, expected a filled model")
    return plan


def matches(pattern: str, names: Iterable[str]) -> list[str]:
    """The name itself; else the names that end with it, or that it describes as a regular expression."""
    names = list(names)
    if pattern in names:
        return [pattern]
    ends = [name for name in names if name.endswith(f".{pattern}")]
    if ends:
        return ends
    try:
        return [name for name in names if re.fullmatch(pattern, name)]
    except re.error:
        return []


def is_norm(module: nn.Module) -> bool:
    """A normalisation layer by its looks: its name says so, it holds no modules, and its parameters are vectors."""
    own = list(module.parameters())
    return (
        "norm" in type(module).__name__.lower()
        and bool(own)
        and not len(module._modules)
        and all(p.dim() < 2 for p in own)
    )


def _named(word, parameters, modules) -> list[str]:
    if word == "bias":
        return [name for name in parameters if name.rpartition(".")[2] == "bias" or name.endswith("_bias")]
    if word == "norm":
        norms = {path for path, module in modules.items() if is_norm(module)}
        return [name for name in parameters if name.rpartition(".")[0] in norms]
    return matches(word, parameters)


def _no_parameter(word: str, where: str, parameters: Iterable[str]) -> str:
    if word == "bias":
        return f"but no parameter{where} is one: add_missing_bias=True gives linear layers biases to train"
    if word == "norm":
        return f"but there is no normalisation layer{where} with parameters"
    return f"which is no parameter{where}{near(word, parameters, words=('bias', 'norm'))}"


def _add_modules(op, config, parameters, modules, plan):
    for name in config.modules:
        paths = matches(name, [path for path in modules if path])
        prefixes = tuple(f"{path}." for path in paths)
        owned = {id(p) for path in paths for p in modules[path].parameters()}
        found = [n for n, p in parameters.items() if n.startswith(prefixes) or id(p) in owned] if paths else []
        if not found:
            what = "has no parameters" if paths else f"is no module{near(name, (path for path in modules if path))}"
            raise ValueError(f"{op}: modules has {name!r}, which {what}")
        plan.whole.update((n, "modules") for n in found)


def _add_biases(op, config, model, modules, passed, in_scope, plan):
    if not config.add_missing_bias:
        return
    head = innermost(output_embeddings(model))
    linears: dict[str, Any] = {path: m for path, m in modules.items() if path and not_linear_reason(m) is None}
    if config.add_missing_bias is True:
        lacking = [p for p, m in linears.items() if m.bias is None and m is not head and p not in passed]
        plan.biases += [path for path in lacking if in_scope(f"{path}.")]
        if not plan.biases and not plan.whole:
            raise ValueError(f"{op}: add_missing_bias is True, but no linear layer lacks a bias")
        return
    for path in config.add_missing_bias:
        if path not in linears or linears[path].bias is not None:
            what = "has a bias" if path in linears else f"is no linear layer{near(path, linears)}"
            raise ValueError(f"{op}: add_missing_bias has {path!r}, which {what}")
        if path in passed:
            raise ValueError(f"{op}: add_missing_bias has {path!r}, which is {passed[path]}")
        if not in_scope(f"{path}."):
            raise ValueError(f"{op}: add_missing_bias has {path!r}, which is not in layers={config.layers!r}")
        plan.biases.append(path)


def _slices(op, kind, pattern, part, seed, modules, passed, in_scope) -> list[Slice]:
    found = [path for path in matches(pattern, (p for p in modules if p)) if in_scope(f"{path}.")]
    if not found:
        linears = [path for path, module in modules.items() if not_linear_reason(module) is None]
        raise ValueError(f"{op}: {kind} has {pattern!r}, which is no linear layer{near(pattern, linears)}")
    slices = []
    for path in found:
        module = modules[path]
        own = own_path_reason(module)
        own = None if own is None else f"one that {own}"
        reason = not_linear_reason(module) or own or passed.get(path)
        if reason is not None:
            raise TypeError(f"{op}: {kind} names {path}, which is {reason}, expected a plain nn.Linear or Conv1D")
        size = module.weight.shape[(kind == "columns") != is_conv1d(module)]
        numbers = part
        if isinstance(part, float):
            numbers = random.Random(f"{seed} {path}").sample(range(size), max(1, round(part * size)))
        slices.append(Slice(path, kind, index_of(op, f"{kind}[{pattern!r}]", numbers, size)))
    return slices


def _add_tokens(op, config, model, modules, passed, plan):
    tables = config.tokens
    if not isinstance(tables, Mapping):
        tables = {_input_embedding(op, model, modules): tables} if tables else {}
    for name, ids in tables.items():
        embeddings = [path for path, module in modules.items() if isinstance(module, nn.Embedding)]
        paths = matches(name, (path for path in modules if path))
        if len({id(getattr(modules[path], "weight", path)) for path in paths}) != 1:
            raise ValueError(f"{op}: tokens names {name!r}, which is {len(paths)} modules{near(name, embeddings)}")
        module = modules[paths[0]]
        reason = _no_token_rows(module) or passed.get(paths[0])
        if reason is not None:
            raise TypeError(f"{op}: tokens names {paths[0]}, which is {reason}, expected a plain nn.Embedding")
        index = index_of(op, "tokens", ids, module.num_embeddings)
        tied = [p for p, m in modules.items() if m is not module and getattr(m, "weight", None) is module.weight]
        for path in (paths[0], *tied):
            other = modules[path]
            if _no_token_rows(other) is not None and not_linear_reason(other) is not None:
                raise TypeError(f"{op}: {path} is tied to {paths[0]}, expected a plain nn.Linear or nn.Embedding")
            if path in passed:
                raise TypeError(f"{op}: {path} is tied to {paths[0]}, but {passed[path]}, expected one that is called")
            if getattr(other, "padding_idx", None) in index.tolist():
                raise ValueError(f"{op}: tokens has {other.padding_idx}, the padding, which gets no gradient")
        plan.slices.append(Slice(paths[0], "tokens", index, tuple(tied)))


def _no_token_rows(module: nn.Module) -> str | None:
    """Hooks move along with an embedding; another forward on the instance cannot."""
    own = "an Embedding with another forward on the instance" if "forward" in module.__dict__ else None
    return no_embedding_reason(module) or own


def _input_embedding(op, model, modules) -> str:
    table = innermost(input_embeddings(model))
    for path, module in modules.items():
        if table is not None and module is table:
            return path
    tables = {path: module.num_embeddings for path, module in modules.items() if isinstance(module, nn.Embedding)}
    if not tables:
        raise ValueError(f"{op}: tokens is given, but the model has no nn.Embedding")
    return max(tables, key=tables.__getitem__)


def _check_disjoint(op, parameters, modules, plan):
    taken = {id(parameters[name]): name for name in plan.whole}
    for part in plan.slices:
        weight = modules[part.path].weight
        if id(weight) in taken:
            raise ValueError(f"{op}: {part.kind} and {taken[id(weight)]} mean the same weight, expected one of them")
        taken[id(weight)] = f"{part.kind} of {part.path}"
        sharers = [path for path, m in modules.items() if getattr(m, "weight", None) is weight and path != part.path]
        if part.kind != "tokens" and sharers:
            raise ValueError(f"{op}: {part.kind} names {part.path}, whose weight is also {sharers[0]}'s; use tokens")


def _note_ties(model, plan):
    for names in owners(model).values():
        trained = next((name for name in names if name in plan.whole), None)
        if trained is not None and len(names) > 1:
            plan.notes.append(f"{trained} is tied to {', '.join(n for n in names if n != trained)}")
    for part in plan.slices:
        plan.notes += [f"{path} is tied to {part.path}" for path in part.tied]
