"""What the cache of a transformers model, whatever it is called, tells and carries from one call to the next."""

from typing import Any

import torch
from torch import Tensor, nn

# How the arguments are called in which models hand their state on: attention's keys and values; Mamba's and its kin's
# convolutions and sums; RWKV's list of tensors.
CACHES = ("past_key_values", "cache_params", "state")
# Of models whose state can be neither asked for its length nor given a note.
OTHER_CACHES = ("mems", "past_buckets_states", "cache", "inference_params", "cache_context")


def cache_of(call: Any) -> Any:
    """The cache among a call's arguments, or in an output; None where there is none."""
    if isinstance(call, tuple):  # an output without names
        return next((value for value in call if hasattr(value, "get_seq_length")), None)
    values = (call.get(name) if isinstance(call, dict) else getattr(call, name, None) for name in CACHES)
    return next((value for value in values if value is not None), None)


def tokens_in(cache: Any) -> int | Tensor | None:
    """How many tokens it holds; None where only its own kind of state could tell."""
    if not hasattr(cache, "get_seq_length"):
        return cache[0][0].shape[-2] if _pairs(cache) else None
    try:
        return cache.get_seq_length()
    except ValueError:  # no layer of it attends
        return None if cache.has_previous_state() else 0


def leave(cache: Any, key: str, note: Any) -> None:
    """Have the cache carry a note."""
    setattr(_carrier(cache), key, note)


def found(cache: Any, key: str) -> Any:
    """The note that a cache carries, unless it has been emptied since; None without one."""
    note = getattr(_carrier(cache), key, None)
    if note is None:
        return None
    count = tokens_in(cache)
    if isinstance(count, Tensor) and count.is_cuda and torch.cuda.is_current_stream_capturing():
        return note  # looking would wait; what is replayed goes on from tokens, as it did here
    return None if count is not None and count == 0 else note


def begun(cache: Any) -> bool:
    """Whether tokens have gone into a cache that carries no note."""
    count = tokens_in(cache)
    if count is None:
        return hasattr(cache, "has_previous_state")  # and so it has one: an empty one holds 0 tokens
    return bool(count > 0)


def make_room(cache: Any, tokens: int, model: nn.Module) -> None:
    """Have a cache of a fixed size hold so many tokens more; it is empty, so its memory may be taken anew."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    for layer in getattr(cache, "layers", ()):
        size = getattr(layer, "max_cache_len", None)
        if not isinstance(size, int) or size < 0:
            continue
        window = getattr(text, "sliding_window", None) if getattr(layer, "is_sliding", False) else None
        wanted = size + tokens if window is None else max(size, min(size + tokens, window))
        if wanted != size:
            layer.max_cache_len, layer.is_initialized = wanted, False


def padded_to(mask: Tensor, cache: Any, given: Tensor) -> Tensor:
    """A mask as wide as a cache of a fixed size, where the caller's was."""
    if given.shape[1] <= mask.shape[1] or not hasattr(cache, "get_max_length"):
        return mask
    return nn.functional.pad(mask, (0, max(0, cache.get_max_length() - mask.shape[1])))


def masks_later(attention_mask: Tensor | None = None, **rest: Any) -> Tensor | None:
    """In place of a model's ``create_masks_for_generate``: its forward makes the masks, after a prompt has come in."""
    return attention_mask


def _pairs(cache: Any) -> bool:
    """Whether it is a pair of keys and values for each layer, as transformers had it once."""
    return isinstance(cache, tuple) and bool(cache) and isinstance(cache[0], tuple) and len(cache[0]) > 1


def _carrier(cache: Any) -> Any:
    """A list or tuple holds tensors that can be given what it cannot be given itself."""
    while isinstance(cache, list | tuple) and cache:
        cache = cache[0]
    return cache
