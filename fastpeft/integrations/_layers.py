"""What ``accelerate`` and ``restore`` ask of a model, whichever library's layers it has."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from .. import _check


def layers_of(op: str, model: object, kind: type, expected: str) -> dict[str, Any]:
    """Path and layer of every module of one kind.

    Raises:
        TypeError: ``model`` is no module. ValueError: it has none; ``expected`` says what it should have had.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model is {_check.shown(model)}, expected a torch.nn.Module")
    layers = {path: module for path, module in model.named_modules() if isinstance(module, kind)}
    if not layers:
        raise ValueError(f"{op}: model has {expected}")
    return layers


def refuse_unfused(reasons: Mapping[str, str | None], what: str) -> None:
    """Raises ValueError with the path and reason of every layer that has one."""
    lines = [f"  {path}: {reason}" for path, reason in reasons.items() if reason is not None]
    if lines:
        first = f"accelerate: strict, but {len(lines)} of {len(reasons)} {what} would not be fused"
        raise ValueError("\n".join([first, *lines]))
