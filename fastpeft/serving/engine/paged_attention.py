"""A model's own attention function, over the paged cache: called for each group of a step's rows, with their blocks.

While a step runs, the model's configs name ``NAME`` as their attention. A thread without a step, which runs the same
model meanwhile, finds the model's own function behind that name.
"""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .layout import Layout

NAME = "fastpeft_paged"


class Unpaged(ValueError):
    """Why a model that is looked at cannot be served over a paged cache."""


class _Current(threading.local):
    layout: Layout | None = None
    seen: list[tuple[int, int | None]] | None = None  # layers and their windows, while a model is looked at


_current = _Current()
_switching = threading.Lock()
_switched: dict[int, tuple[Any, str, int]] = {}  # by id: a config, its own attention, and how many steps run


@contextlib.contextmanager
def running(configs: Sequence[Any], layout: Layout, seen: list | None = None) -> Iterator[None]:
    """Inside, the forward of the model with these configs is, in this thread, the layout's step.

    Args:
        configs: ``configs_of`` the model.
        layout: of the step.
        seen: gets each layer's index and window.
    """
    with _switching:
        for config in configs:
            _, own, steps = _switched.get(id(config), (config, config._attn_implementation, 0))
            _switched[id(config)] = config, own, steps + 1
            config._attn_implementation_internal = NAME
    outer = _current.layout, _current.seen
    _current.layout, _current.seen = layout, seen
    try:
        yield
    finally:
        _current.layout, _current.seen = outer
        with _switching:
            for config in configs:
                _, own, steps = _switched[id(config)]
                _switched[id(config)] = config, own, steps - 1
                if steps == 1:
                    config._attn_implementation_internal = own
                    del _switched[id(config)]


def register() -> None:
    """Have transformers know ``NAME``.

    Raises:
        ImportError: it has no attention functions by name.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)


def configs_of(model: nn.Module) -> list[Any]:
    """Those that name the attention of a model and of its parts."""
    found: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation_internal"):
            found[id(config)] = config
    return list(found.values())


def _attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args, **kwargs) -> Any:
    """What a layer calls with the tokens of all rows, ``[1, heads, T, D]``; ``[1, T, heads, D]``."""
    own, additive = _own(module)
    layout = _current.layout
    if layout is None:
        return own(module, query, key, value, attention_mask, *args, **kwargs)
    window = kwargs.get("sliding_window")
    if _current.seen is not None:
        if attention_mask is not None:
            raise Unpaged("its attention has a mask of its own")
        pools = layout.pages.layers[module.layer_idx]
        if any(pool.shape[2:] != (t.shape[1], t.shape[3]) for pool, t in zip(pools, (key, value), strict=True)):
            raise Unpaged("its cache keeps less than its attention reads")
        _current.seen.append((module.layer_idx, window))
    layout.write(module.layer_idx, key, value)
    outputs = []
    for group in layout.groups:
        q = query[0, :, group.start : group.stop].unflatten(1, (group.rows, group.queries)).transpose(0, 1)
        keys, values, mask = layout.read(module.layer_idx, group, window)
        if additive:
            mask = _additive(mask, group.queries, q)
        output = own(module, q, keys, values, mask, *args, **kwargs)[0]
        outputs.append(output.flatten(0, 1))
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs))[None], None


def _own(module: Any) -> tuple[Callable[..., Any], bool]:
    """The layer's own attention function, and whether its mask is added to the scores. Kernels without one: SDPA."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    switched = _switched.get(id(module.config))
    name = module.config._attn_implementation if switched is None else switched[1]
    if name == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward, True
    return ALL_ATTENTION_FUNCTIONS["sdpa" if _current.layout is not None else name], False


def _additive(mask: Tensor | None, queries: int, like: Tensor) -> Tensor | None:
    if mask is None:
        if queries == 1:
            return None
        mask = torch.ones(queries, queries, dtype=torch.bool, device=like.device).tril()[None, None]
    least = torch.finfo(like.dtype).min
    return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill(~mask, least)
