"""A different adapter for each row of a batch, where the method allows it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from ..nn.rows import RowAdapters, check_rows
from .attachment import holder_of
from .registry import method_of
from .row_method import RowMethod


@contextmanager
def per_row(model: nn.Module, adapter_names: Sequence[str | None]) -> Iterator[nn.Module]:
    """Inside the ``with`` block row i of every batch has the adapter ``adapter_names[i]``, or none where that is None.

    For prompts and prefixes, in training and in ``generate``. A single call can be given the same as
    ``model(..., adapter_names=[...])``. LoRA adapters by row: ``fastpeft.serving.AdapterBank``.

    >>> with fastpeft.per_row(model, ["alice", None, "bob"]):
    ...     model.generate(input_ids, attention_mask=mask)

    Args:
        model: A model that prompts or prefixes are attached to, or a wrapper around it; it is what the block is given.
        adapter_names: A name, or None, for each row. A batch may hold every row several times, one after another, as
            beam search makes it.

    Raises:
        TypeError: ``adapter_names`` is no list of names.
        ValueError: There is no such adapter, or it is of a method that acts on all rows alike.
    """
    holder, state = holder_of("per_row", model)
    rows = check_rows("per_row", adapter_names, state.configs)
    for name in filter(None, rows):
        for config in state.parts(name):
            method = method_of("per_row", config)
            if not isinstance(method, RowMethod):
                raise ValueError(f"per_row: adapter {name!r} is {method.title}, which acts on all rows alike")
    parts = [module for module in holder.children() if isinstance(module, RowAdapters)]
    before = [part.rows for part in parts]
    for part in parts:
        part.rows = tuple(name if name in part.names else None for name in rows)
    try:
        yield model
    finally:
        for part, earlier in zip(parts, before, strict=True):
            part.rows = earlier
