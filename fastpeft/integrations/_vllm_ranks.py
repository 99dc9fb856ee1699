"""The true ranks of the adapters in vLLM's slots, noted where a layer takes an adapter in or lets it go.

vLLM pads every adapter to ``max_lora_rank`` and hands its wrapper the padded weights, not the layer. So a table is
found by the address of the layer's first ``lora_a_stacked``. The layer owns its table, and an entry lasts as long as
the address is the layer's.
"""

import functools
import weakref
from typing import Any

import torch
from torch import Tensor

from . import _interface

_TABLES: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()


def ranks_of(lora_a: Tensor) -> Tensor | None:
    """The true ranks ``int32 [P, slots]`` of the layer whose first stacked A this is; None if nobody noted any."""
    return _TABLES.get(lora_a.data_ptr())


def record_ranks(base: Any) -> None:
    """Wrap ``set_lora`` and ``reset_lora`` of a layer class and its subclasses, wherever one defines its own."""
    for method, note in (("set_lora", _filled), ("reset_lora", _emptied)):
        original = base.__dict__.get(method)
        if original is not None and not _interface.is_marked(original):
            setattr(base, method, _followed_by(original, note))
    for subclass in base.__subclasses__():
        record_ranks(subclass)


def _followed_by(original, note):
    @functools.wraps(original)
    def method(self, index, *args, **kwargs):
        result = original(self, index, *args, **kwargs)
        note(self, index)
        return result

    _interface.mark(method)
    return method


def _table(layer) -> Tensor:
    first = layer.lora_a_stacked[0]
    ranks = layer.__dict__.get("fastpeft_ranks")
    if ranks is None or _TABLES.get(first.data_ptr()) is not ranks:
        shape = len(layer.lora_a_stacked), first.shape[0]
        # vLLM takes adapters in during steps, which are in inference mode, and between them, where nothing made there
        # could be changed.
        with torch.inference_mode(False):
            ranks = torch.full(shape, first.shape[2], dtype=torch.int32, device=first.device)
        layer.__dict__["fastpeft_ranks"] = _TABLES[first.data_ptr()] = ranks
    return ranks


def _emptied(layer, index: int) -> None:
    """Nothing is left to add; but a ``set_lora`` that was not wrapped would find its adapter ignored."""
    known = _interface.is_marked(type(layer).set_lora)
    _table(layer)[:, index] = 0 if known else layer.lora_a_stacked[0].shape[2]


def _filled(layer, index: int) -> None:
    """The rank up to which A has a row that is not 0: what vLLM padded adds nothing. Does not wait for the device."""
    ranks = _table(layer)
    for p, a in enumerate(layer.lora_a_stacked):
        rows = (a[index, 0] != 0).any(1)
        ranks[p, index] = (rows * torch.arange(1, len(rows) + 1, device=rows.device)).amax()
