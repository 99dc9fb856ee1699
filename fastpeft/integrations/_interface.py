"""Whether a package still has the interface that an integration was written against, and what has been replaced in it.

An interface maps ``"module:Class.name"`` to the parameters' names, in order, or to ``"property"`` or ``"attribute"``.
More parameters than expected do no harm if they may be left out.
"""

import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

Wanted = tuple[str, ...] | str
Present = inspect.Signature | str

# What a plug-in says once it is in place, so that nobody takes an engine's own kernels for ours.
SERVED = (
    "fastpeft: LoRA of linear layers is served by fastpeft's kernels; those of experts (MoE) keep {0}'s own kernels, "
    "as do embeddings and heads"
)


def problems(interface: Mapping[str, Wanted], look: Callable[[str], Present] | None = None) -> list[str]:
    """What differs, one line each, or nothing. ``look`` finds what a name stands for, by default by import."""
    found = []
    for target, wanted in interface.items():
        try:
            present = (look or _live)(target)
        except (ImportError, AttributeError) as error:
            found.append(f"{target} is missing ({error})")
            continue
        if not _fits(wanted, present):
            names = wanted if isinstance(wanted, str) else f"({', '.join(wanted)})"
            found.append(f"{target} is {present}, expected {names}")
    return found


def mark(function: Any) -> None:
    """Note that a function of the package has been replaced by ours."""
    function.fastpeft = True


def is_marked(function: object) -> bool:
    """Whether ``mark`` has been called on it."""
    return hasattr(function, "fastpeft")


def _fits(wanted: Wanted, present: Present) -> bool:
    if isinstance(wanted, str) or isinstance(present, str):
        return wanted == present
    parameters = list(present.parameters.values())
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    optional = {p.name for p in parameters if p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    rest = [p.name for p in parameters if p.name not in positional[: len(wanted)]]
    return tuple(positional[: len(wanted)]) == wanted and set(rest) <= optional


def _live(target: str) -> Present:
    module, _, path = target.partition(":")
    owner: Any = importlib.import_module(module)
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    found = inspect.getattr_static(owner, name, None)
    if isinstance(found, property):
        return "property"
    if isinstance(found, (classmethod, staticmethod)):
        found = found.__func__
    if inspect.isfunction(found):
        found = inspect.unwrap(found)
        return inspect.Signature([p.replace(annotation=p.empty) for p in inspect.signature(found).parameters.values()])
    if found is not None or name in getattr(owner, "__annotations__", {}) or _assigned(owner, name):
        return "attribute"
    raise AttributeError(f"{owner.__name__} has no {name}")


def _assigned(owner: type, name: str) -> bool:
    """Whether the class's own source speaks of ``self.name``; what an instance has, no class shows."""
    return re.search(rf"\bself\.{name}\b", inspect.getsource(owner)) is not None
