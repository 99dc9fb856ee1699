"""The attention functions that stand in for those of transformers where a model has prefixes.

Most layers attend beside the prefix (``prefix_attention``), which is never copied. Where that is not all that a layer
does, in a window, with capped scores or with sinks, the prefix is put in front of every row's keys and the model's own
function computes the rest.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .prefix import KWARG, Call
from .prefix_attention import Prefix, prefix_attention

# Options of attention functions that change the scores: prefix_attention knows none of them.
SPECIAL = ("sliding_window", "softcap", "s_aux", "sinks")
Attention = Callable[..., tuple[Tensor, Tensor | None]]


def eager_of(module: nn.Module) -> Attention | None:
    """The eager attention of the file that a module's class comes from; transformers knows it by no other name."""
    return getattr(sys.modules.get(type(module).__module__), "eager_attention_forward", None)


def eager(module: nn.Module, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
    """Attention as the model's own file computes it."""
    return eager_of(module)(module, *args, **options)  # type: ignore[misc]  # looked for when it was attached


def attention_beside(original: Attention) -> Attention:
    """An attention function for transformers: to the prefix of this call too, or ``original`` where there is none."""

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        call: Call | None = options.pop(KWARG, None)
        if call is None or getattr(module, "is_cross_attention", False):
            return original(module, query, key, value, attention_mask, **options)
        layer: Any = module.layer_idx
        call.seen.add(layer)
        causal = options.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        mask = None if attention_mask is None else attention_mask[..., : key.shape[2]]
        causal = bool(causal) and mask is None and query.shape[2] > 1
        if any(options.get(name) is not None for name in SPECIAL):
            window = options.get("sliding_window")
            keys, values, mask = in_front(query, key, value, call.of(layer), mask, causal, call.places, window)
            return original(module, query, keys, values, mask, **{**options, "is_causal": False})
        scale = options.get("scaling")
        out = prefix_attention(
            query,
            key,
            value,
            call.of(layer),
            mask,
            causal,
            query.shape[-1] ** -0.5 if scale is None else scale,
            options.get("dropout") or 0.0,
        )
        return out.transpose(1, 2).contiguous(), None

    return attention


def in_front(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefixes: Sequence[Prefix],
    mask: Tensor | None,
    causal: bool,
    places: Tensor,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values with each row's prefix in front of them, and the mask of both.

    Args:
        query: ``[B, H, T, D]``. key, value: ``[B, Hkv, S, D]``.
        prefixes: no row may have two.
        mask: of the row's own keys, as ``prefix_attention`` takes it.
        causal: without a mask: query t sees keys up to t.
        places: ``[B or 1, T]``, of the queries, the prefix counted.
        window: W: a query at place t sees key i of its prefix where ``t - i < W``; None: all of it.
    """
    batch, queries, longest = len(query), query.shape[2], max(k.shape[1] for k, *_ in prefixes)
    keys, values = (t.new_zeros(batch, t.shape[1], longest, t.shape[3]) for t in (key, value))
    length = torch.zeros(batch, dtype=torch.int64, device=query.device)
    for k, v, rows in prefixes:
        which = torch.arange(batch, device=query.device) if rows is None else rows
        size = k.shape[1]
        length = length.index_fill(0, which, size)
        room = (0, 0, 0, longest - size)
        k, v = (nn.functional.pad(t, room).to(like.dtype) for t, like in ((k, key), (v, value)))
        keys = keys.index_copy(0, which, k.expand(len(which), -1, -1, -1))
        values = values.index_copy(0, which, v.expand(len(which), -1, -1, -1))
    steps = torch.arange(longest, device=query.device)
    seen = (steps < length[:, None])[:, None].expand(batch, queries, longest)
    if window is not None:
        seen = seen & (places[..., None] - steps < window)
    seen = seen[:, None]
    if mask is None:
        own = torch.ones(queries, key.shape[2], dtype=torch.bool, device=query.device)
        mask = (own.tril() if causal else own)[None, None]
    if mask.dtype != torch.bool:
        lowest = torch.finfo(mask.dtype).min
        seen = torch.zeros_like(seen, dtype=mask.dtype).masked_fill(seen.logical_not(), lowest)
    heads = mask.shape[1]
    both = torch.cat([seen.expand(-1, heads, -1, -1), mask.expand(batch, -1, queries, -1)], 3)
    return torch.cat([keys, key], 2), torch.cat([values, value], 2), both
