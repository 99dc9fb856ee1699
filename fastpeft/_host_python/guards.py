"""What a layer has found out about itself holds until something that it read has changed."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .key import PLAIN, thread_is_plain

_ABSENT = object()


def _autocasts(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


class Guards:
    """Asked before every call whether all that it was told is still so, by identity."""

    def __init__(self) -> None:
        self._entries: list[tuple[dict, Any, Any]] = []
        self._empty: list[Any] = []
        self._items: list[tuple[Sequence, list]] = []
        self._kinds: list[tuple[Any, type]] = []
        self._tensors: list[tuple[Tensor, torch.dtype, torch.device]] = []
        self._input: tuple[torch.dtype, torch.device, bool] | None = None

    def is_(self, dictionary: dict, name: str, value: Any) -> None:
        """The dictionary holds this very value under the name."""
        self._entries.append((dictionary, name, value))

    def absent(self, dictionary: dict, name: str) -> None:
        """The dictionary holds nothing under the name."""
        self._entries.append((dictionary, name, _ABSENT))

    def empty(self, container: Any) -> None:
        """The dictionary, list or set is empty."""
        self._empty.append(container)

    def items(self, sequence: Sequence) -> None:
        """The list or tuple holds these very objects."""
        self._items.append((sequence, list(sequence)))

    def type(self, value: Any) -> None:
        """The object is of this very class."""
        self._kinds.append((value, type(value)))

    def tensor(self, tensor: Tensor) -> None:
        """The tensor has this class, dtype and device."""
        self.type(tensor)
        self._tensors.append((tensor, tensor.dtype, tensor.device))

    def input(self, like: Tensor) -> None:
        """Inputs are plain tensors of this dtype on this device, and autocast is as it is."""
        self._input = like.dtype, like.device, _autocasts(like.device.type)

    def versions(self) -> int:
        """What rises when any of the tensors is modified in place."""
        found = 0
        for tensor, _, _ in self._tensors:
            found += 0 if tensor.is_inference() else tensor._version
        return found

    def __call__(self, x: Tensor | None) -> bool:
        if self._input is None or not thread_is_plain():
            return False
        dtype, device, casts = self._input
        if _autocasts(device.type) != casts:
            return False
        if x is not None and (type(x) not in PLAIN or x.dtype is not dtype or x.device != device or _unusual(x)):
            return False
        for dictionary, name, value in self._entries:
            if dictionary.get(name, _ABSENT) is not value:
                return False
        for container in self._empty:
            if container:
                return False
        for sequence, found in self._items:
            if len(sequence) != len(found) or any(a is not b for a, b in zip(sequence, found, strict=True)):
                return False
        for object_, kind in self._kinds:
            if type(object_) is not kind:
                return False
        for tensor, was, at in self._tensors:
            if tensor.dtype is not was or tensor.device != at:
                return False
        return True


def _unusual(x: Tensor) -> bool:
    return x.layout is not torch.strided or x.is_nested
