"""The arguments of ``prompt_gather``, checked: op, argument, what was given, what was expected."""

import torch
from torch import Tensor

from .. import _check
from .._device import constant

INTEGERS = (torch.int32, torch.int64)


def source(input_ids, embedding, inputs_embeds) -> Tensor:
    """Where the tokens' embeddings come from."""
    if inputs_embeds is not None:
        if input_ids is not None or embedding is not None:
            raise ValueError("prompt_gather: inputs_embeds is given beside input_ids or embedding, expected either")
        like = inputs_embeds if isinstance(inputs_embeds, Tensor) else torch.empty(0)
        return _check.tensor("prompt_gather", "inputs_embeds", inputs_embeds, ("B", "T", "D"), {}, like)
    if input_ids is None or embedding is None:
        raise ValueError("prompt_gather: expected input_ids and embedding, or inputs_embeds")
    like = embedding if isinstance(embedding, Tensor) else torch.empty(0)
    _check.tensor("prompt_gather", "embedding", embedding, ("V", "D"), {}, like)
    integers("input_ids", input_ids, None, embedding)
    return embedding


def table(prompts, lengths, source: Tensor) -> tuple[Tensor, list[int]]:
    """All prompts in one tensor, and the length of each."""
    d = source.shape[-1]
    if isinstance(prompts, Tensor):
        if lengths is None:
            raise ValueError("prompt_gather: prompts is one tensor without lengths, expected the length of each prompt")
        _check.tensor("prompt_gather", "prompts", prompts, ("S", "D"), {"D": d}, source)
        given = list(_check.items("prompt_gather", "lengths", lengths))
        lengths = [_check.integer("prompt_gather", ("lengths", i), length) for i, length in enumerate(given)]
        if any(length < 0 for length in lengths) or sum(lengths) != prompts.shape[0]:
            expected = f"numbers of at least 0 that add up to {prompts.shape[0]}"
            raise ValueError(f"prompt_gather: lengths is {_check.listed(lengths)}, expected {expected}")
        return prompts, lengths
    if lengths is not None:
        raise ValueError("prompt_gather: lengths is given beside one tensor for each prompt, expected None")
    _check.items("prompt_gather", "prompts", prompts)
    for i, prompt in enumerate(prompts):
        _check.tensor("prompt_gather", f"prompts[{i}]", prompt, ("P", "D"), {"D": d}, source)
        _check.dtype("prompt_gather", f"prompts[{i}]", prompt, prompts[0].dtype)
    if not prompts:
        return source.new_empty(0, d), []
    return prompts[0] if len(prompts) == 1 else torch.cat(list(prompts)), [p.shape[0] for p in prompts]


def rows(prompt_ids, b: int, lengths: list[int], source: Tensor) -> tuple[Tensor, int]:
    """Each row's prompt on the device, and the longest of them."""
    if isinstance(prompt_ids, Tensor):
        return integers("prompt_ids", prompt_ids, (b,), source), max([0, *lengths])
    given = [-1 if p is None else p for p in _check.items("prompt_gather", "prompt_ids", prompt_ids)]
    if len(given) != b:
        raise ValueError(f"prompt_gather: prompt_ids has {len(given)} items, expected one for each of {b} rows")
    expected = f"-1 ... {len(lengths) - 1}"
    found = [_check.integer("prompt_gather", ("prompt_ids", i), p, expected) for i, p in enumerate(given)]
    for p in found:
        if not -1 <= p < len(lengths):
            raise ValueError(f"prompt_gather: prompt_ids holds prompt {p}, expected {expected}")
    longest = max([0, *(lengths[p] for p in found if p >= 0)])
    return constant(tuple(found), torch.int64, source.device), longest


def integers(name: str, value, shape: tuple[int, ...] | None, like: Tensor, allowed=INTEGERS) -> Tensor:
    """Check an integer argument; position_ids of one row serve every row."""
    wanted = "[B, T]" if shape is None else list(shape)
    if not isinstance(value, Tensor):
        raise TypeError(f"prompt_gather: {name} is {_check.shown(value)}, expected a tensor {wanted}")
    if value.dtype not in allowed:
        names = " or ".join(map(str, allowed))
        raise TypeError(f"prompt_gather: {name} has dtype {value.dtype}, expected {names}")
    if value.device != like.device:
        raise ValueError(f"prompt_gather: {name} is on {value.device}, expected {like.device}")
    if name == "position_ids" and shape is not None and value.dim() == 2 and value.shape[0] == 1:
        value = value.expand(shape[0], -1)
    if value.dim() != 2 if shape is None else tuple(value.shape) != shape:
        raise ValueError(f"prompt_gather: {name} has shape {list(value.shape)}, expected {wanted}")
    return value
