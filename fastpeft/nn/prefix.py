"""Learned keys and values in front of every layer's, and the hooks that hand them to the model's attention."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from .prefix_attention import Prefix, prefix_attention
from .rows import RowAdapters

OP = "PrefixTuning"
KWARG = "fastpeft_prefix"  # of the model's forward, handed down to every attention


class Sizes(NamedTuple):
    """Of a model: layers, heads of keys and values, and the width of a head."""

    layers: int
    heads: int
    width: int


class Call(NamedTuple):
    """The prefixes of one forward of the model, made once: ``values [layers, 2, heads, P, width]`` and their rows.

    An argument of that forward, so that a checkpointed layer is computed again with the same ones.
    """

    values: list[tuple[Tensor, Tensor | None]]
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

    Args:
        model: the transformers model; its forward's arguments are read.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.adapters = nn.ModuleDict()
        self.arguments = tuple(inspect.signature(model.forward).parameters)
        # RoBERTa numbers positions from its padding token's on, and only over tokens.
        embeddings: list[Any] = [m for m in model.modules() if hasattr(m, "create_position_ids_from_inputs_embeds")]
        self.padding = int(embeddings[0].padding_idx) if embeddings else None

    @property
    def parts(self) -> nn.ModuleDict:
        return self.adapters

    def adapter(self, name: str) -> PrefixAdapter:
        """The prefix of this name."""
        return cast(PrefixAdapter, self.adapters[name])

    def attach(self, model: nn.Module) -> None:
        """Hook into the model."""
        self.handles = [
            model.register_forward_pre_hook(self.before, with_kwargs=True),
            model.register_forward_hook(self.after, with_kwargs=True),
        ]

    def before(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The model's arguments, with the prefixes of this call and positions after them."""
        given = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        names = self.take(OP, model, given)
        tokens = given.get("input_ids") if given.get("inputs_embeds") is None else given["inputs_embeds"]
        if not isinstance(tokens, Tensor):
            return (), given
        members = self.members(OP, names, tokens.shape[0])
        if not any(members):
            return (), given
        self._refuse(model)
        kinds = list(dict.fromkeys(member for member in members if member))
        values = {name: self.adapter(name).values() for name in dict.fromkeys(n for kind in kinds for n in kind)}
        parts = []
        for kind in kinds:
            which = [b for b, member in enumerate(members) if member == kind]
            rows = None if len(which) == len(members) else torch.tensor(which, device=tokens.device)
            parts.append((torch.cat([values[name] for name in kind], 3) if len(kind) > 1 else values[kind[0]], rows))
        if "position_ids" in self.arguments:
            lengths = [sum(self.adapter(name).length for name in member) for member in members]
            given["position_ids"] = self._positions(given, tokens, lengths)
        given.pop("cache_position", None)
        return (), {**given, KWARG: Call(parts, set())}

    def after(self, model: nn.Module, args: tuple, kwargs: dict, output) -> None:
        """Raise if the model's layers did not all ask for their prefix, rather than have it silently ignored."""
        call = kwargs.get(KWARG)
        if call is not None and call.seen != set(range(len(call.values[0][0]))):
            missing = sorted(set(range(len(call.values[0][0]))) - call.seen)
            raise RuntimeError(
                f"{OP}: layers {missing} of {type(model).__name__} did not attend to their prefix: expected a model "
                "whose forward hands its keyword arguments on to transformers' attention functions"
            )

    def _positions(self, given: dict, tokens: Tensor, lengths: list[int]) -> Tensor:
        """A token's position counts the prefix before it."""
        shift = torch.tensor(lengths[:1] if len(set(lengths)) == 1 else lengths, device=tokens.device)[:, None]
        if given.get("position_ids") is not None:
            return given["position_ids"] + shift
        cache: Any = given.get("past_key_values")
        past = cache.get_seq_length() if hasattr(cache, "get_seq_length") else 0
        if self.padding is None:
            return torch.arange(past, past + tokens.shape[1], device=tokens.device)[None] + shift
        if tokens.dim() == 3:
            return torch.arange(tokens.shape[1], device=tokens.device)[None] + (self.padding + 1 + past) + shift
        on = (tokens != self.padding).long()
        return on * (on.cumsum(1) + past + shift) + self.padding

    def _refuse(self, model: nn.Module) -> None:
        """Reentrant checkpointing drops the gradient of what is no argument of a layer."""
        for module in model.modules():
            function = getattr(module, "_gradient_checkpointing_func", None)
            on = getattr(module, "gradient_checkpointing", False) and module.training
            if on and getattr(function, "keywords", {}).get("use_reentrant", False):
                raise ValueError(
                    f"{OP}: gradient checkpointing is reentrant, expected "
                    'gradient_checkpointing_enable({"use_reentrant": False})'
                )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: {self.adapter(name).length}" for name in self.adapters)


def attention_beside(original: Callable) -> Callable:
    """An attention function for transformers: to the prefix of this call too, or ``original`` where there is none."""

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options
    ) -> tuple[Tensor, Tensor | None]:
        call = options.pop(KWARG, None)
        if call is None or getattr(module, "is_cross_attention", False):
            return original(module, query, key, value, attention_mask, **options)
        for name in ("softcap", "s_aux", "position_bias"):
            if options.get(name) is not None:
                raise ValueError(f"{OP}: {type(module).__name__} has {name}, which is not served beside a prefix")
        causal = options.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        mask = None if attention_mask is None else attention_mask[..., : key.shape[2]]
        scale = options.get("scaling")
        out = prefix_attention(
            query,
            key,
            value,
            call.of(module.layer_idx),
            mask,
            bool(causal) and mask is None and query.shape[2] > 1,
            query.shape[-1] ** -0.5 if scale is None else scale,
            options.get("dropout") or 0.0,
        )
        call.seen.add(module.layer_idx)
        return out.transpose(1, 2).contiguous(), None

    return attention
