"""A model over a paged cache: its forward for a step, and why a model cannot be served so."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .layout import Layout, Part
from .paged_attention import Unpaged, configs_of, register, running
from .pages import LayerShape, Pages


def run(model: Any, layout: Layout, **more: Any) -> Any:
    """The model's forward for a step."""
    return model(input_ids=layout.ids, position_ids=layout.positions, use_cache=False, **more)


def unpaged_reason(model: nn.Module, shapes: Sequence[LayerShape], device: torch.device) -> str | None:
    """Why the model cannot be served over a paged cache, or None: it is run on two short rows."""
    if "position_ids" not in inspect.signature(type(model).forward).parameters:
        return "it takes no position_ids"
    config: Any = getattr(model, "config", None)
    kinds = getattr(config.get_text_config(), "layer_types", None) or ["full_attention"] * len(shapes)
    other = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if other:
        return f"it has layers of kind {', '.join(other)}"
    seen: list[tuple[int, int | None]] = []
    try:
        register()
        pages = Pages(2, shapes, device)
        tables = torch.tensor([[1], [2]], device=device)
        layout = Layout([Part(0, [0, 0], 0, 2), Part(1, [0], 0, 1)], tables, pages)
        with running(configs_of(model), layout, seen):
            run(model, layout)
    except Unpaged as reason:
        return str(reason)
    except Exception as error:
        return f"a paged step fails in it ({type(error).__name__})"
    if sorted(layer for layer, _ in seen) != list(range(len(shapes))):
        return f"{len(seen)} of {len(shapes)} layers call an attention function of transformers"
    if any(kinds[layer] == "sliding_attention" and window is None for layer, window in seen):
        return "its layers do not tell their sliding window"
    return None
