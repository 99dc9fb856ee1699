"""A program: what a call of an op asks of PyTorch and of the device, recorded once and run again on other tensors."""

import threading
from array import array
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import driver, operators, source


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


class Program:
    """Steps on slots; those up to ``inputs`` are the arguments of ``run``, the constants follow.

    With the first arguments they become one function. That of an allocation, a kernel's launch and a product with the
    second argument's transpose::

        def steps(inputs):
            try: frame = frames.pop()
            except IndexError: frame = new()
            if frame.stream != stream(device): frame.to(stream(device))
            words = frame.words
            (l0,) = frame.launches
            (t0, t1,) = inputs
            t3 = c0(c1, c2, c3)
            words[0] = t0.data_ptr()
            words[1] = t3.data_ptr()
            error = launch(*l0)
            if error: failed(error, device, l0)
            c4(t3, t0, t1.t())
            frames.append(frame)
            return [t3, t0]

    ``words`` are the parameters of all launches, each address and number once; those of numbers and constants are
    written before. A frame serves one run at a time, so that threads do not meet. A slot is let go behind the last step
    that speaks of it.

    Args:
        inputs: how many arguments there are.
        constants: tensors that are the same in every run.
        device: what it runs on.
    """

    def __init__(self, inputs: int, constants: Sequence[Tensor], device: torch.device):
        self.inputs, self._constants, self._device = inputs, list(constants), device
        self._kind, self._index = device.type, device.index if device.type == "cuda" else None
        self._names = source.Names(view=_view, failed=driver.failed, device=device.index)
        self._steps: list[Callable[[], list[str]]] = []  # what writes the lines of each
        self._last: dict[int, int] = {}  # of each slot, the step after which it is let go
        self._results: Sequence[Ref | None] = ()
        self._words, self._places = array("Q"), dict[Any, int]()  # a parameter's place: of a number, a slot's address
        self._launches: list[driver.Launch] = []
        self._frames: list[driver.Frame] = []
        self._examples: dict[int, Tensor] = {inputs + i: tensor for i, tensor in enumerate(self._constants)}
        self._run: Any = None
        self._lock = threading.Lock()

    def empty(self, slot: int, sizes: Sequence[int], strides: Sequence[int], dtype: torch.dtype, device: Any) -> None:
        """A step that allocates."""
        name, own = self._names, operators.EMPTY.get(device.type)
        made = f"{name(tuple(sizes))}, {name(tuple(strides))}"
        if own is not None and device in (self._device, torch.device("cpu")):
            made = f"{name(own)}({made}, {name(dtype)})"
        else:
            made = f"{name(torch.empty_strided)}({made}, dtype={name(dtype)}, device={name(device)})"
        self._add(lambda: [f"t{slot} = {made}"], [slot])

    def launch(self, function: int, grid: Sequence[int], threads: int, shared: int, parameters: Sequence) -> None:
        """A step that launches a kernel, whose parameters are refs or eight bytes that hold a number."""

        def lines() -> list[str]:
            own = f"l{len(self._launches)}"
            found = [line for parameter in parameters if (line := self._word(parameter)) is not None]
            words = tuple([self._places[_word_key(parameter)] for parameter in parameters])
            self._launches.append(driver.Launch(function, (grid[0], grid[1], grid[2]), threads, shared, words))
            return [*found, f"error = launch(*{own})", f"if error: failed(error, device, {own})"]

        self._add(lines, _slots(parameters))

    def call(self, name: str, overload: str, arguments: Sequence, outputs: Sequence[int]) -> None:
        """A step that calls an operator of PyTorch.

        Args:
            name: its namespace and name; overload: of it.
            arguments: in the schema's order: values, refs, or lists of refs.
            outputs: a slot for each; -1 where it is a tensor that is there already.
        """
        function, given, named = operators.called(name, overload, arguments)
        made = [(i, slot) for i, slot in enumerate(outputs) if slot >= 0]

        def lines() -> list[str]:
            words = [*map(self._value, given), *(f"{key}={self._value(value)}" for key, value in named.items())]
            line = f"{self._names(function)}({', '.join(words)})"
            if len(outputs) == 1 or not made:
                return [f"t{slot} = {line}" for _, slot in made] or [line]
            return [f"several = {line}", *(f"t{slot} = several[{i}]" for i, slot in made), "several = None"]

        self._add(lines, [*_slots([*given, *named.values()]), *(slot for _, slot in made)])

    def returns(self, results: Sequence[Ref | None]) -> None:
        """To be called once, after the last step: what ``run`` returns."""
        self._results = results

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor | None]:
        """The results; None where there is none. Recorded below autograd and autocast, and so run there."""
        if self._index is not None and _current_device() != self._index:
            with torch.cuda.device(self._index):
                return self.run(inputs)
        steps = self._run or self._written(inputs)
        with _below_autograd():
            if _is_autocast_enabled(self._kind):
                with _below_autocast():
                    return steps(inputs)
            return steps(inputs)

    def _written(self, inputs: Sequence[Tensor]) -> Callable:
        """The function, for arguments that look like these."""
        with self._lock:
            if self._run is None:
                self._run = self._function(inputs)
        return self._run

    def _function(self, inputs: Sequence[Tensor]) -> Callable:
        self._examples.update(enumerate(inputs))
        steps = [write() for write in self._steps]
        kept = {ref.slot for ref in self._results if ref is not None}
        for slot, last in self._last.items():
            if slot >= self.inputs + len(self._constants) and slot not in kept:
                steps[last].append(f"t{slot} = None")
        lines = [f"({_listed('t', self.inputs)}) = inputs"] if self.inputs else []
        lines += [line for step in steps for line in step]
        if self._launches:
            unpacked = f"({_listed('l', len(self._launches))}) = frame.launches"
            lines = [*_TAKE, unpacked, *lines, "frames.append(frame)"]
            self._names.known.update(launch=driver.launcher(), new=self._frame, frames=self._frames)
            self._names.known.update(stream=_current_stream if self._index is not None else lambda _: 0)
        lines.append(f"return [{', '.join(map(self._value, self._results))}]")
        self._names.known.update({f"t{self.inputs + i}": tensor for i, tensor in enumerate(self._constants)})
        for slot in range(self.inputs):
            del self._examples[slot]
        return source.function("steps(inputs)", lines, self._names)

    def _frame(self) -> driver.Frame:
        return driver.Frame(self._words, self._launches)

    def _word(self, parameter: Any) -> str | None:
        """Gives a launch's parameter its place among the words; the line that writes it, if a run has to."""
        key = _word_key(parameter)
        if key in self._places:
            return None
        place = self._places[key] = len(self._words)
        self._words.append(0 if isinstance(parameter, Ref) else parameter)
        if not isinstance(parameter, Ref):
            return None
        constant = parameter.slot - self.inputs
        if 0 <= constant < len(self._constants):
            self._words[place] = self._constants[constant].data_ptr() + parameter.offset
            return None
        plus = f" + {self._names(parameter.offset)}" if parameter.offset else ""
        return f"words[{place}] = t{parameter.slot}.data_ptr(){plus}"

    def _value(self, value: Any) -> str:
        if isinstance(value, Ref):
            return self._tensor(value)
        if type(value) is list and any(isinstance(item, Ref) for item in value):
            return f"[{', '.join(map(self._tensor, value))}]"
        return self._names(value)

    def _tensor(self, ref: Ref) -> str:
        own, example, name = f"t{ref.slot}", self._examples.get(ref.slot), self._names
        if ref.whole:
            return own
        if example is not None and example.dtype == ref.dtype and ref.offset == 0:
            turned = example.t() if example.dim() == 2 else None
            if turned is not None and (turned.shape, turned.stride()) == (ref.sizes, ref.strides):
                return f"{own}.t()"
            return f"{own}.as_strided({name(ref.sizes)}, {name(ref.strides)})"
        return f"view({own}, {name(ref.sizes)}, {name(ref.strides)}, {name(ref.offset)}, {name(ref.dtype)})"

    def _add(self, lines: Callable[[], list[str]], slots: Sequence[int]) -> None:
        for slot in slots:
            self._last[slot] = len(self._steps)
        self._steps.append(lines)


_TAKE = (  # a frame that no other run uses; the function puts it back
    "try: frame = frames.pop()",
    "except IndexError: frame = new()",
    "if frame.stream != stream(device): frame.to(stream(device))",
    "words = frame.words",
)


def _word_key(parameter: Any) -> Any:
    return (parameter.slot, parameter.offset) if isinstance(parameter, Ref) else parameter


def _listed(letter: str, count: int) -> str:
    return "".join(f"{letter}{i}, " for i in range(count))


def _slots(values: Sequence) -> list[int]:
    """Those of the refs among the values, and in lists among them."""
    flat = [item for value in values for item in (value if type(value) is list else [value])]
    return [item.slot for item in flat if isinstance(item, Ref)]


def _view(base: Tensor, sizes: tuple, strides: tuple, offset: int, dtype: torch.dtype) -> Tensor:
    if base.dtype is dtype:
        return base.as_strided(sizes, strides, base.storage_offset() + offset // dtype.itemsize)
    first = (base.storage_offset() * base.element_size() + offset) // dtype.itemsize
    view = torch.empty(0, dtype=dtype, device=base.device)
    return view.set_(base.untyped_storage(), first, sizes, strides)


_below_autograd, _below_autocast = torch._C._AutoDispatchBelowADInplaceOrView, torch._C._DisableAutocast
_is_autocast_enabled = torch.is_autocast_enabled
_current_device: Any = getattr(torch._C, "_cuda_getDevice", None)  # which builds for CPUs lack
_current_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)
