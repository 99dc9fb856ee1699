"""``resize_token_embeddings`` of a model of transformers that is attached to: refused where an adapter is in the way.

transformers makes new modules of the embedding and the head, which adapters at those places cannot follow; it would
find out after it had changed one of the two.
"""

from typing import Any

from torch import nn

from ..nn.live_slice import LiveSlice
from ..nn.protocol import original_child
from .embeddings import input_embeddings, output_embeddings

_ATTRIBUTE = "resize_token_embeddings"


class _Resize:
    """Stands for ``resize_token_embeddings`` of a module while adapters are attached to it, or around it."""

    def __init__(self, module: nn.Module):
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the module's own method does, if no adapter stands at an end of the model."""
        paths = {inner: path for path, inner in self.module.named_modules()}
        for end in (input_embeddings(self.module), output_embeddings(self.module)):
            if end is not None and (original_child(end) is not None or isinstance(end, LiveSlice)):
                raise ValueError(
                    f"{_ATTRIBUTE}: {paths.get(end, 'the embedding')} has an adapter ({type(end).__name__}) of the "
                    "size that it has, expected a module without: detach, resize and attach again"
                )
        own: Any = type(self.module).resize_token_embeddings  # type: ignore[attr-defined]
        return own(self.module, *args, **kwargs)


def watch_sizes(model: nn.Module) -> None:
    """Have the modules that can resize their embeddings refuse where adapters are in the way.

    Args:
        model: Any module.
    """
    for module in model.modules():
        if callable(getattr(type(module), _ATTRIBUTE, None)):
            module.__dict__[_ATTRIBUTE] = _Resize(module)


def unwatch_sizes(model: nn.Module) -> None:
    """Undo ``watch_sizes``.

    Args:
        model: As it was given.
    """
    for module in model.modules():
        if isinstance(module.__dict__.get(_ATTRIBUTE), _Resize):
            del module.__dict__[_ATTRIBUTE]
