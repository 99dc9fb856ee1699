"""Learned prompts in front of token embeddings, for a batch whose rows have different prompts, or none.

    Y[b] = [padding] prompt_b, tokens_b [padding]            tokens_b = E[ids_b] or x_b, without the row's own padding
    mask, positions, labels to match                         written by the same launch
    dprompt_p = Σ_{rows b with prompt p} dY[b, its place]    rows in their order: deterministic
    dx[b, t]  = dY[b, its place]                             only where x asks for it; E gets none here

Saved for backward: four integers a row. Eager PyTorch writes the embeddings, repeats the prompts, and concatenates both
into a third tensor; here every output is written once. Source: Lester et al., "The Power of Scale for
Parameter-Efficient Prompt Tuning" (2021).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding as look_up

from .. import _backend, _check
from .._library import register_op
from . import prompt_gather_arguments as arguments
from .prompt_gather_arguments import INTEGERS

SIDES = ("right", "left")


class PromptBatch(NamedTuple):
    """What ``prompt_gather`` returns; W is the padded length.

    Attributes:
        inputs_embeds: ``[B, W, D]`` in the embeddings' dtype; 0 in padding.
        attention_mask: ``[B, W]`` in the given mask's dtype, or int64: 1 over prompts, 0 in padding.
        position_ids: int64 ``[B, W]``: 0, 1, ... from the first of a row's prompt on; 0 in padding.
        labels: int64 ``[B, W]``, ``ignore_index`` over prompts and padding; None where none were given.
    """

    inputs_embeds: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    labels: Tensor | None


def _implementation(
    prompts, source, ids, prompt_ids, attention_mask, labels, position_ids, lengths, width, left, ignore_index, backend
):
    impl = _backend.load("prompt_gather", backend)
    if source.device.type == "cpu":
        _within("prompt_ids", "prompt", prompt_ids, -1, len(lengths) - 1)
        if ids.dim() == 2:
            _within("input_ids", "token", ids, 0, source.shape[0] - 1)
    optional = (t if t.dim() == 2 else None for t in (ids, attention_mask, labels, position_ids))
    y, mask, positions, y_labels, rows = impl.forward(
        prompts, lengths, prompt_ids, source, *optional, width, left, ignore_index
    )
    return [y, mask, positions, _absent(source) if y_labels is None else y_labels], rows


def _within(name: str, what: str, values: Tensor, lowest: int, highest: int) -> None:
    if values.numel():
        low, high = values.min().item(), values.max().item()
        if low < lowest or high > highest:
            wrong = low if low < lowest else high
            raise ValueError(f"prompt_gather: {name} holds {what} {wrong}, expected {lowest} ... {highest}")


def _absent(like: Tensor) -> Tensor:
    return like.new_empty(0, dtype=torch.int64)


def _fake(
    prompts, source, ids, prompt_ids, attention_mask, labels, position_ids, lengths, width, left, ignore_index, backend
):
    b = prompt_ids.shape[0]
    kind = attention_mask.dtype if attention_mask.dim() == 2 else torch.int64
    outs = [source.new_empty(b, width, source.shape[-1])]
    outs += [source.new_empty(b, width, dtype=dtype) for dtype in (kind, torch.int64)]
    outs.append(source.new_empty(b, width, dtype=torch.int64) if labels.dim() == 2 else _absent(source))
    return outs, source.new_empty(b, 4, dtype=torch.int64)


def _setup_context(ctx, inputs, output):
    prompts, source, ids, _, _, _, _, lengths, *_, backend = inputs
    ctx.needs = [prompts.requires_grad, source.requires_grad]
    ctx.save_for_backward(output[1])
    ctx.settings = list(lengths), prompts.dtype, source.shape[1] if ids.dim() != 2 else 0, backend


def _backward(ctx, grads, _):
    (rows,) = ctx.saved_tensors
    lengths, dtype, tokens, backend = ctx.settings
    found = [None, None]
    if any(ctx.needs):
        found = _prompt_gather_backward(grads[0], rows, lengths, dtype, tokens, ctx.needs, backend)
    return *(grad if need else None for grad, need in zip(found, ctx.needs, strict=True)), *[None] * 10


def _backward_implementation(dy, rows, lengths, dtype, tokens, needs, backend):
    """``[dprompts, dx]``; what is not needed is an empty tensor."""
    found = _backend.load("prompt_gather", backend).backward(dy, rows, lengths, dtype, tokens, *needs)
    return [dy.new_empty(0) if grad is None else grad for grad in found]


def _backward_fake(dy, rows, lengths, dtype, tokens, needs, backend):
    b, _, d = dy.shape
    dprompts = dy.new_empty(sum(lengths), d, dtype=dtype) if needs[0] else dy.new_empty(0)
    return [dprompts, dy.new_empty(b, tokens, d) if needs[1] else dy.new_empty(0)]


_prompt_gather_backward = register_op(
    "prompt_gather_backward",
    "(Tensor dy, Tensor rows, SymInt[] lengths, ScalarType dtype, SymInt tokens, bool[] needs, str backend) "
    "-> Tensor[]",
    _backward_implementation,
    _backward_fake,
)
_prompt_gather = register_op(
    "prompt_gather",
    "(Tensor prompts, Tensor source, Tensor ids, Tensor prompt_ids, Tensor attention_mask, Tensor labels, "
    "Tensor position_ids, SymInt[] lengths, SymInt width, bool left, int ignore_index, str backend) "
    "-> (Tensor[], Tensor)",
    _implementation,
    _fake,
    _setup_context,
    _backward,
)


def prompt_gather(
    prompts: Tensor | Sequence[Tensor],
    prompt_ids: Sequence[int | None] | Tensor,
    input_ids: Tensor | None = None,
    embedding: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    position_ids: Tensor | None = None,
    lengths: Sequence[int] | None = None,
    padding_side: str = "right",
    ignore_index: int = -100,
    backend: str | None = None,
) -> PromptBatch:
    """Put each row's learned prompt in front of its tokens, and pad the batch to one length.

    The tokens of a row are what lies between the first and the last 1 of its mask: the row's own padding is taken off
    before its prompt is put on, so a row gets what it would get alone. W is T plus the longest prompt: among the rows'
    where ``prompt_ids`` is a sequence, among all where it is a tensor (looking into it would wait for the device).

    Args:
        prompts: one ``[P_i, D]`` for each prompt; or all of them in one ``[S, D]``, with ``lengths`` of each. Any
            floating-point dtype; they are rounded to the embeddings'.
        prompt_ids: for each row the number of its prompt, and -1 or None for no prompt; a list, or an integer tensor
            ``[B]``. A prompt that does not exist is an error in a list and on the CPU; in a tensor on a GPU it is none.
        input_ids: the tokens ``[B, T]``, int32 or int64, looked up in ``embedding``. A token outside of it is an error
            on the CPU and NaN on a GPU.
        embedding: ``[V, D]``, read directly. One that is trained gets its gradient as by F.embedding.
        inputs_embeds: the tokens' embeddings ``[B, T, D]``, instead of input_ids and embedding; differentiable.
        attention_mask: ``[B, T]`` of integers or bool; None: all 1.
        labels: ``[B, T]`` of integers; None: none are returned.
        position_ids: ``[B, T]`` or ``[1, T]``, of the tokens without their prompt; None: 0, 1, ... in every row.
        lengths: the rows of each prompt, where ``prompts`` is one tensor; else None.
        padding_side: "right" or "left", of the output; the input may be padded on either.
        ignore_index: the label of prompts and padding, which no loss counts.
        backend: "cuda", "triton" or "reference", which then serves the call, or raises with the reason why it cannot.
            None takes the environment's ``FASTPEFT_BACKEND``, and without one the first of the three that can serve.

    Returns:
        Embeddings, attention mask, positions and labels of the longer batch.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value, or the backend asked for cannot serve the call.
            Every message names the op, the argument, what it is and what was expected.
    """
    source = arguments.source(input_ids, embedding, inputs_embeds)
    ids = _absent(source) if inputs_embeds is not None or input_ids is None else input_ids
    b, t = source.shape[:2] if inputs_embeds is not None else ids.shape
    table, lengths = arguments.table(prompts, lengths, source)
    prompt_ids, longest = arguments.rows(prompt_ids, b, lengths, source)
    optional = {"attention_mask": attention_mask, "labels": labels, "position_ids": position_ids}
    for name, value in optional.items():
        allowed = (*INTEGERS, torch.bool) if name == "attention_mask" else INTEGERS
        optional[name] = _absent(source) if value is None else arguments.integers(name, value, (b, t), source, allowed)
    _check.one_of("prompt_gather", "padding_side", padding_side, SIDES)
    ignore_index = _check.integer("prompt_gather", "ignore_index", ignore_index)
    backend = _backend.choose("prompt_gather", backend, REASONS, source, table)
    left = padding_side == "left"
    if inputs_embeds is None and source.requires_grad and torch.is_grad_enabled():
        source, ids = look_up(ids, source), _absent(source)
    outs, _ = _prompt_gather(
        table, source, ids, prompt_ids, *optional.values(), lengths, t + longest, left, ignore_index, backend
    )
    embeds, mask, positions, found = outs
    return PromptBatch(embeds, mask, positions, None if labels is None else found)


def _triton_reason(source: Tensor, prompts: Tensor) -> str | None:
    reason = _backend.triton_reason(source.device)
    return reason or _backend.bfloat16_reason(source.device, source.dtype, prompts.dtype)


REASONS = {
    "cuda": lambda source, prompts: _backend.cuda_missing() or "fastpeft._C has no prompt_gather",
    "triton": _triton_reason,
    "reference": lambda source, prompts: None,
}


def facts(given: dict) -> tuple:
    """What ``REASONS`` look at, of the arguments of ``prompt_gather`` by name."""
    prompts = given["prompts"]
    if not isinstance(prompts, Tensor):
        prompts = next(iter(_check.items("explain", "prompts", prompts)), None)
    source = given["inputs_embeds"] if "inputs_embeds" in given else given["embedding"]
    return source, source if prompts is None else prompts
