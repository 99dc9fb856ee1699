"""Learned keys and values in front of every layer's, and how a call hands them to the model's attention."""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from .._device import constant
from . import cache as caches
from .prefix_attention import Prefix
from .rows import Called, RowAdapters, first_position

KWARG = "fastpeft_prefix"  # of the model's forward, handed down to every attention


class Sizes(NamedTuple):
    """Of a model: layers, heads of keys and values, and the width of a head."""

    layers: int
    heads: int
    width: int


class Call(NamedTuple):
    """The prefixes of one forward of the model, made once.

    An argument of that forward, so that a checkpointed layer is computed again with the same ones.

    Attributes:
        values: ``[layers, 2, heads, P, width]``, and the rows that have them.
        places: ``[B or 1, T]``, of the queries; the prefix before them is counted.
        seen: the layers that have asked.
    """

    values: list[tuple[Tensor, Tensor | None]]
    places: Tensor
    seen: set[int]

    def of(self, layer: int) -> list[Prefix]:
        return [(values[layer, 0], values[layer, 1], rows) for values, rows in self.values]


class PrefixAdapter(nn.Module):
    """One prefix: the keys and values themselves, or what an MLP makes them of.

    ``embedding [P, layers · 2 · heads · width]``; with ``projection``, ``embedding [P, heads · width]`` through Linear,
    Tanh and Linear (Li & Liang, 2021), which trains more steadily. Names and layout are PEFT's.
    """

    fastpeft_added = True

    def __init__(self, sizes: Sizes, length: int, projection: int | None, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.sizes, self.length = sizes, length
        wide, narrow = 2 * sizes.layers * sizes.heads * sizes.width, sizes.heads * sizes.width
        columns = wide if projection is None else narrow
        # Deviation 1, as PEFT draws it: about that of a pretrained model's own keys and values.
        self.embedding = nn.Parameter(torch.randn(length, columns, dtype=dtype, device=device))
        self.transform: nn.Sequential | None = None
        if projection is not None:
            first = nn.Linear(narrow, projection, dtype=dtype, device=device)
            last = nn.Linear(projection, wide, dtype=dtype, device=device)
            self.transform = nn.Sequential(first, nn.Tanh(), last)

    def flat(self) -> Tensor:
        """``[P, layers · 2 · heads · width]``, as PEFT stores it."""
        return self.embedding if self.transform is None else self.transform(self.embedding)

    def values(self) -> Tensor:
        """``[layers, 2, heads, P, width]``."""
        layers, heads, width = self.sizes
        return self.flat().view(self.length, layers, 2, heads, width).permute(1, 2, 3, 0, 4)


class Prefixes(RowAdapters):
    """Named prefixes of a model.

    In a layer that attends to a window of W, a prefix is part of it as in PEFT: the token at position t of its row sees
    the keys i of a prefix of P with ``P + t - i < W``, so that it moves out of sight. Padding in front of a row is not
    counted, so that a row has what it would have alone.

    Args:
        model: the transformers model.
    """

    op, order = "PrefixTuning", 1

    def __init__(self, model: nn.Module):
        super().__init__()
        self.adapters = nn.ModuleDict()
        self.first = first_position(model)

    @property
    def parts(self) -> nn.ModuleDict:
        return self.adapters

    def adapter(self, name: str) -> PrefixAdapter:
        """The prefix of this name."""
        return cast(PrefixAdapter, self.adapters[name])

    def before(self, called: Called, given: dict, rows: Sequence[str | None] | None) -> dict:
        """The call's arguments, with its prefixes and positions after them."""
        tokens = given.get("input_ids") if given.get("inputs_embeds") is None else given["inputs_embeds"]
        if not isinstance(tokens, Tensor):
            return given
        members = self.members(rows, tokens.shape[0])
        if not any(members):
            return given
        self._refuse(called.module)
        kinds = list(dict.fromkeys(member for member in members if member))
        values = {name: self.adapter(name).values() for name in dict.fromkeys(n for kind in kinds for n in kind)}
        parts = []
        for kind in kinds:
            which = [b for b, member in enumerate(members) if member == kind]
            those = None if len(which) == len(members) else constant(tuple(which), torch.int64, tokens.device)
            parts.append((torch.cat([values[name] for name in kind], 3) if len(kind) > 1 else values[kind[0]], those))
        lengths = [sum(self.adapter(name).length for name in member) for member in members]
        places = self._places(given, tokens)
        distinct = lengths[:1] if len(set(lengths)) == 1 else lengths
        shift = constant(tuple(distinct), torch.int64, tokens.device)[:, None]
        if "position_ids" in called.arguments:
            given = {**given, "position_ids": self._positions(given, tokens, places, shift)}
        given.pop("cache_position", None)
        return {**given, KWARG: Call(parts, places + shift, set())}

    def after(self, called: Called, given: dict, output: Any) -> None:
        """Raise if the model's layers did not all ask for their prefix, rather than have it silently ignored."""
        call = given.get(KWARG)
        if call is not None and call.seen != set(range(len(call.values[0][0]))):
            missing = sorted(set(range(len(call.values[0][0]))) - call.seen)
            raise RuntimeError(
                f"{self.op}: layers {missing} of {type(called.module).__name__} did not attend to their prefix: "
                "expected a model whose forward hands its keyword arguments on to transformers' attention functions"
            )

    def _places(self, given: dict, tokens: Tensor) -> Tensor:
        """Which token of its row each is, ``[B or 1, T]``: padding in front of a row counts for nothing."""
        count, mask = tokens.shape[1], given.get("attention_mask")
        steps = _past(given) + torch.arange(count, device=tokens.device)[None]
        if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1]:
            return (steps - (mask != 0).long().argmax(1, keepdim=True)).clamp(min=0)
        positions = given.get("position_ids")
        return positions if positions is not None and positions.dim() == 2 else steps

    def _positions(self, given: dict, tokens: Tensor, places: Tensor, shift: Tensor) -> Tensor:
        """A token's position counts the prefix before it."""
        if given.get("position_ids") is not None:
            return given["position_ids"] + shift
        if self.first == 0 or tokens.dim() == 3:
            return places + self.first + shift
        # RoBERTa counts tokens alone, and its padding has the padding token's position.
        padding = self.first - 1
        on = (tokens != padding).long()
        return on * (on.cumsum(1) + _past(given) + shift) + padding

    def _refuse(self, model: nn.Module) -> None:
        """Reentrant checkpointing drops the gradient of what is no argument of a layer."""
        for module in model.modules():
            function = getattr(module, "_gradient_checkpointing_func", None)
            on = getattr(module, "gradient_checkpointing", False) and module.training
            if on and getattr(function, "keywords", {}).get("use_reentrant", False):
                raise ValueError(
                    f"{self.op}: gradient checkpointing is reentrant, expected "
                    'gradient_checkpointing_enable({"use_reentrant": False})'
                )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: {self.adapter(name).length}" for name in self.adapters)


def _past(given: dict) -> int | Tensor:
    """How many tokens came before; on the device where only it knows, since looking waits."""
    cache = caches.cache_of(given)
    count = None if cache is None else caches.tokens_in(cache)
    return 0 if count is None else count
