"""A program: what a call of an op asks of PyTorch and of the device, recorded once and run again on other tensors."""

import ctypes
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import driver


class Ref(NamedTuple):
    """A tensor of a program: a slot's own, or a view of it, perhaps in another dtype.

    The offset is in bytes from the slot's first element.
    """

    slot: int
    whole: bool
    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    def tensor(self, slots: Sequence) -> Tensor:
        base = slots[self.slot]
        if self.whole:
            return base
        first = (base.storage_offset() * base.element_size() + self.offset) // self.dtype.itemsize
        view = torch.empty(0, dtype=self.dtype, device=base.device)
        return view.set_(base.untyped_storage(), first, self.sizes, self.strides)


_Step = Callable[[list, int | None], None]


class Program:
    """Steps on slots; those up to ``inputs`` are the arguments of ``run``, the constants follow.

    Args:
        inputs: how many arguments there are.
        constants: tensors that are the same in every run.
        device: what it runs on.
    """

    def __init__(self, inputs: int, constants: Sequence[Tensor], device: torch.device):
        self.inputs, self._constants, self._device, self._kind = inputs, list(constants), device, device.type
        self._last: dict[int, int] = {}  # of each slot, the step after which it is let go
        self._steps: list[tuple[_Step, list[int]]] = []  # and the slots that are let go after it
        self._room: list[None] = []
        self._results: Sequence[Ref | None] = ()

    def empty(self, slot: int, sizes: Sequence[int], strides: Sequence[int], dtype: torch.dtype, device: Any) -> None:
        """A step that allocates."""
        sizes, strides = tuple(sizes), tuple(strides)

        def step(slots: list, stream: int | None) -> None:
            slots[slot] = torch.empty_strided(sizes, strides, dtype=dtype, device=device)

        self._add(step, [slot])

    def launch(self, function: int, grid: Sequence[int], threads: int, shared: int, parameters: Sequence) -> None:
        """A step that launches a kernel, whose parameters are refs or eight bytes that hold a number."""
        count, blocks, device = len(parameters), (grid[0], grid[1], grid[2]), self._device.index
        refs = [(i, ref.slot, ref.offset) for i, ref in enumerate(parameters) if isinstance(ref, Ref)]
        words = (ctypes.c_uint64 * count)(*(0 if isinstance(word, Ref) else word for word in parameters))
        pointers = (ctypes.c_void_p * count)(*(ctypes.addressof(words) + 8 * i for i in range(count)))
        lock = threading.Lock()

        def step(slots: list, stream: int) -> None:
            with lock:  # there is one array of words for all threads
                for i, slot, offset in refs:
                    words[i] = slots[slot].data_ptr() + offset
                driver.launch(device, function, blocks, threads, shared, stream, pointers)

        self._add(step, [slot for _, slot, _ in refs])

    def call(self, name: str, overload: str, arguments: Sequence, outputs: Sequence[int]) -> None:
        """A step that calls an operator of PyTorch.

        Args:
            name: its namespace and name; overload: of it.
            arguments: in the schema's order: values, refs, or lists of refs.
            outputs: a slot for each; -1 where it is a tensor that is there already.
        """
        space, _, plain = name.partition("::")
        op = getattr(getattr(getattr(torch.ops, space), plain), overload or "default")
        schema = list(zip(op._schema.arguments, arguments, strict=True))
        given = [value for argument, value in schema if not argument.kwarg_only]
        named = {argument.name: value for argument, value in schema if argument.kwarg_only}
        refs = [(i, ref) for i, ref in enumerate(given) if isinstance(ref, Ref)]
        named_refs = [(key, ref) for key, ref in named.items() if isinstance(ref, Ref)]
        lists = [(i, value) for i, value in enumerate(given) if isinstance(value, list) and value]
        lists = [(i, several) for i, several in lists if isinstance(several[0], Ref)]
        made = [(i, slot) for i, slot in enumerate(outputs) if slot >= 0]

        def step(slots: list, stream: int | None) -> None:
            values = given.copy()
            for i, ref in refs:
                values[i] = ref.tensor(slots)
            for i, several in lists:
                values[i] = [ref.tensor(slots) for ref in several]
            keywords = named if not named_refs else named | {key: ref.tensor(slots) for key, ref in named_refs}
            found = op(*values, **keywords)
            for i, slot in made:
                slots[slot] = found if isinstance(found, Tensor) else found[i]

        used = [ref.slot for _, ref in (*refs, *named_refs)] + [ref.slot for _, several in lists for ref in several]
        self._add(step, [*used, *(slot for _, slot in made)])

    def returns(self, results: Sequence[Ref | None]) -> None:
        """To be called once, after the last step: what ``run`` returns."""
        self._results = results
        kept = {ref.slot for ref in results if ref is not None}
        own = self.inputs + len(self._constants)
        self._room = [None] * (max([own - 1, *self._last]) + 1 - own)
        for slot, last in self._last.items():
            if slot >= own and slot not in kept:
                self._steps[last][1].append(slot)

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor | None]:
        """The results; None where there is none. Nothing is recorded for gradients: the caller has turned that off."""
        kind, stream = self._kind, None
        if kind == "cuda":
            if torch._C._cuda_getDevice() != self._device.index:
                with torch.cuda.device(self._device):
                    return self.run(inputs)
            stream = torch._C._cuda_getCurrentRawStream(self._device.index)
        slots: list = [*inputs, *self._constants, *self._room]
        casts = torch.is_autocast_enabled(kind)
        if casts:  # recorded below autocast, and so run there
            torch.set_autocast_enabled(kind, False)
        try:
            for step, letting in self._steps:
                step(slots, stream)
                for slot in letting:
                    slots[slot] = None
        finally:
            if casts:
                torch.set_autocast_enabled(kind, True)
        return [None if ref is None else ref.tensor(slots) for ref in self._results]

    def _add(self, step: Any, slots: Sequence[int]) -> None:
        for slot in slots:
            self._last[slot] = len(self._steps)
        self._steps.append((step, []))
