"""Rotary embeddings whose frequencies depend on the length of the sequence, of each row by its own length.

transformers' "longrope" and "dynamic" kinds choose the frequencies of a whole call by its largest position. In a step,
each row's positions are given to the model's embedding by themselves, followed by the row's last one: so a prompt that
is read in pieces has the frequencies that it has when it is read at once.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .layout import Layout

_GROWING = ("longrope", "dynamic")


def length_dependent(model: nn.Module) -> list[Any]:
    """The modules whose frequencies depend on the length."""
    return [module for module in model.modules() if any(kind in _GROWING for kind in _kinds(module))]


def recomputed_past(model: nn.Module) -> int | None:
    """The length past which a longrope model needs its keys anew, with the long factors; or None."""
    for module in length_dependent(model):
        if "longrope" in _kinds(module):
            config: Any = module.config
            rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
            found = getattr(config, "original_max_position_embeddings", None)
            return found or rope.get("original_max_position_embeddings")
    return None


@contextlib.contextmanager
def row_by_row(modules: list[Any], layout: Layout) -> Iterator[None]:
    """Inside, the modules compute the layout's step row by row."""
    for module in modules:
        module.forward = _RowByRow(module, layout)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


class _RowByRow:
    def __init__(self, module: Any, layout: Layout):
        self._module, self._layout = module, layout

    def __call__(self, x: Tensor, position_ids: Tensor, *args, **kwargs) -> tuple[Tensor, ...]:
        module, parts = self._module, []
        for positions, (count, total) in zip(
            position_ids[0].split([count for count, _ in self._layout.totals]), self._layout.totals, strict=True
        ):
            _forget(module)
            last = positions.new_tensor([total - 1])
            found = type(module).forward(module, x, torch.cat([positions, last])[None], *args, **kwargs)
            parts.append([t[:, :count] for t in found])
        _forget(module)
        return tuple(torch.cat(columns, dim=1) for columns in zip(*parts, strict=True))


def _forget(module: Any) -> None:
    """The frequencies of the longest sequence so far, which a "dynamic" embedding keeps."""
    kinds = module.rope_type if isinstance(module.rope_type, dict) else {"": module.rope_type}
    for layer, kind in kinds.items():
        if kind == "dynamic":
            prefix = f"{layer}_" if layer else ""
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
            own = getattr(module, f"{prefix}original_inv_freq")
            module.register_buffer(f"{prefix}inv_freq", own.to(getattr(module, f"{prefix}inv_freq").device), False)


def _kinds(module: Any) -> tuple[str, ...]:
    kind = getattr(module, "rope_type", None)
    return tuple(kind.values()) if isinstance(kind, dict) else (kind,) if isinstance(kind, str) else ()
