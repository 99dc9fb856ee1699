"""What a layer has found out about itself holds until something that it read has changed."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import key, source


class Guards:
    """Asked before every call whether all that it was told is still so, by identity.

    What it is told becomes one function, when it is first asked::

        def holds(x):
            if not thread_is_plain() or casts(c0) is not False: return False
            if x is not None and (type(x) not in PLAIN or x.dtype is not c1 or x.device != c2): return False
            if x is not None and (x.layout is not strided or x.is_nested): return False
            try: return c3[c4] is c5 and c6 not in c3 and not c7 and type(c8) is c9 and c10.dtype is c1
            except KeyError: return False
    """

    def __init__(self) -> None:
        self._names = source.Names(thread_is_plain=key.thread_is_plain, PLAIN=key.PLAIN, strided=torch.strided)
        self._told: dict[str, None] = {}  # conditions, each once
        self._tensors: list[str] = []  # their names
        self._input: list[str] = []  # lines
        self._holds: Any = None
        self._versions: Any = None

    def is_(self, dictionary: dict, name: str, value: Any) -> None:
        """The dictionary holds this very value under the name."""
        held, own = self._names(dictionary), self._key(name)
        if type(dictionary) not in (dict, OrderedDict):  # which may make a value where there is none
            self._tell(f"{own} in {held}")
        self._tell(f"{held}[{own}] is {self._names(value)}")

    def absent(self, dictionary: dict, name: str) -> None:
        """The dictionary holds nothing under the name."""
        self._tell(f"{self._key(name)} not in {self._names(dictionary)}")

    def empty(self, container: Any) -> None:
        """The dictionary, list or set is empty."""
        self._tell(f"not {self._names(container)}")

    def items(self, sequence: Sequence) -> None:
        """The list or tuple holds these very objects."""
        held = self._names(sequence)
        self._tell(f"len({held}) == {len(sequence)}")
        for i, item in enumerate(sequence):
            self._tell(f"{held}[{i}] is {self._names(item)}")

    def type(self, value: Any) -> None:
        """The object is of this very class."""
        self._tell(f"type({self._names(value)}) is {self._names(type(value))}")

    def tensor(self, tensor: Tensor) -> None:
        """The tensor has this class, dtype and device."""
        self.type(tensor)
        own = self._names(tensor)
        self._tell(f"{own}.dtype is {self._names(tensor.dtype)}")
        self._tell(f"{own}.device == {self._names(tensor.device)}")
        self._tensors.append(own)

    def input(self, like: Tensor) -> None:
        """Inputs are plain tensors of this dtype on this device, and autocast is as it is."""
        name, kind = self._names, like.device.type
        ready = "thread_is_plain()"
        if torch.amp.is_autocast_available(kind):
            name.known["casts"] = torch.is_autocast_enabled
            ready += f" and casts({name(kind)}) is {torch.is_autocast_enabled(kind)}"
        unlike = f"type(x) not in PLAIN or x.dtype is not {name(like.dtype)} or x.device != {name(like.device)}"
        self._input = [
            f"if not ({ready}): return False",
            f"if x is not None and ({unlike}): return False",
            "if x is not None and (x.layout is not strided or x.is_nested): return False",
        ]

    def versions(self) -> int:
        """What rises when any of the tensors is modified in place."""
        if self._versions is None:
            every = " + ".join(f"{tensor}._version" for tensor in self._tensors) or "0"
            counted = [f"({tensor}.is_inference() or {tensor}._version)" for tensor in self._tensors]
            lines = [f"try: return {every}", f"except RuntimeError: return {' + '.join(counted)}"]  # inference has none
            self._versions = source.function("versions()", lines, self._names)
        return self._versions()

    def __call__(self, x: Tensor | None) -> bool:
        holds = self._holds
        if holds is None:
            told = [f"try: return {' and '.join(self._told) or True}", "except KeyError: return False"]
            lines = [*self._input, *told] if self._input else ["return False"]
            holds = self._holds = source.function("holds(x)", lines, self._names)
        return holds(x)

    def _key(self, name: Any) -> str:
        return repr(name) if type(name) is str else self._names(name)

    def _tell(self, condition: str) -> None:
        self._told[condition] = self._holds = None
