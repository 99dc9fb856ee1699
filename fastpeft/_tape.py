"""Records what a call asks of PyTorch and of the device, so that ``fastpeft._host`` can run it again without Python.

A call of an op on plain tensors always does the same for the same shapes, strides, dtypes and numbers: it allocates,
launches kernels, calls PyTorch's operators. A tape notes these steps while the call takes its ordinary way, with every
tensor as a place in some storage: an argument's, a constant's, or one that a step allocates. What cannot be repeated
(a value that was read, a write into what outlives the call, a kernel that was launched past ``launched``) refuses the
tape, and the call goes through Python for good.
"""

import struct
import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_ACTIVE = threading.local()
_EMPTY = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
}
_OURS = "fastpeft"  # the namespace of ops that write where their caller has asked them to
_READS = {Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__}  # of values, past the dispatcher
_KERNELS: dict[int, Any] = {}  # alive as long as a program may launch them: Triton unloads what nobody holds
_SCRATCH = (0, 0)  # the pointers that Triton's kernels take behind their arguments, of memory that ours do not use


class Refused(Exception):
    """Why a call cannot be recorded."""


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: in the storage of ``slot``, from ``offset`` bytes behind that slot's first element on."""

    slot: tuple[str, int]
    whole: bool
    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


def recording() -> "Tape | None":
    """The tape of this thread."""
    return getattr(_ACTIVE, "tape", None)


def launched(kernel: Any, compiled: Any, grid: Sequence[int], arguments: Sequence) -> None:
    """To be called after every launch of a kernel of Triton: it is noted where a call is being recorded.

    Args:
        kernel: the kernel; compiled: what launching it returned, None in the interpreter.
        grid: as it was launched; arguments: those that are no constants of compilation, in their order.
    """
    tape = recording()
    if tape is not None:
        tape.launched(kernel, compiled, grid, arguments)


def unrecorded(what: str) -> None:
    """To be called before anything that no tape sees: a call that does it is not recorded."""
    tape = recording()
    if tape is not None:
        tape.refuse(f"{what} are not recorded")


class _Reads(TorchFunctionMode):
    """Sees the reads of values that PyTorch does not dispatch."""

    def __init__(self, tape: "Tape"):
        super().__init__()
        self.tape = tape

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in _READS:
            self.tape.refuse(f"{func.__name__} reads values")
        return func(*args, **(kwargs or {}))


class Tape(TorchDispatchMode):
    """Records what happens inside of ``with``, on this thread.

    Args:
        inputs: the tensors that a program made of this will be given in place of these.
    """

    def __init__(self, inputs: Sequence[Tensor]):
        super().__init__()
        self.inputs = list(inputs)
        self.refused: str | None = None
        self.node: Any = None  # what autograd was told, see _library
        self._reads = _Reads(self)
        self._steps: list[tuple] = []
        self._constants: list[Tensor] = []
        self._created: list[Tensor] = []  # alive, so that no other storage takes their addresses
        self._slots: dict[int, list[tuple[str, int]]] = {}
        for i, tensor in enumerate(self.inputs):
            self._slots.setdefault(_storage(tensor), []).append(("input", i))

    def __enter__(self):
        if recording() is not None:
            raise RuntimeError("a call is being recorded already")
        _ACTIVE.tape = self
        self._reads.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        _ACTIVE.tape = None
        super().__exit__(*error)
        return self._reads.__exit__(*error)

    def refuse(self, reason: str) -> None:
        """Make no program of this."""
        self.refused = self.refused or reason

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        outputs = func(*args, **kwargs)
        if self.refused is None:
            try:
                self._note(func, args, kwargs, outputs)
            except Refused as error:
                self.refuse(str(error))
        return outputs

    def launched(self, kernel: Any, compiled: Any, grid: Sequence[int], arguments: Sequence) -> None:
        if self.refused is not None:
            return
        try:
            self._steps.append(("launch", *self._launch(kernel, compiled, grid, arguments)))
        except Refused as error:
            self.refuse(str(error))

    def place(self, tensor: Tensor) -> Place:
        """Where a tensor lies; what no step has allocated, and no argument is, is a constant."""
        slots = self._slots.get(_storage(tensor))
        if slots is None:
            self._add(tensor, "constant", self._constants)
            return self.place(tensor)
        same = [slot for slot in slots if _layout(self._base(slot)) == _layout(tensor)]
        near = same[:1]  # several: one tensor given twice, which the key knows
        near = near or [slot for slot in slots if _first(self._base(slot)) == _first(tensor)] or slots
        if len(near) > 1:
            raise Refused("two arguments lie in the same memory")
        offset = _first(tensor) - _first(self._base(near[0]))
        return Place(near[0], bool(same), offset, tuple(tensor.shape), tensor.stride(), tensor.dtype)

    def program(
        self, host: Any, results: Sequence[Tensor | None], device: torch.device, viewed: Collection[int] = ()
    ) -> Any:
        """``host.Program`` of the steps, returning ``results``.

        Args:
            viewed: the inputs in whose place a program is given them in another shape.

        Raises:
            Refused: with the reason.
        """
        places = [None if result is None else self.place(result) for result in results]
        if self.refused is not None:
            raise Refused(self.refused)
        first = {"input": 0, "constant": len(self.inputs), "created": len(self.inputs) + len(self._constants)}

        def ref(place: Place, result: bool = False) -> Any:
            kind, number = place.slot
            whole = place.whole and (result or kind != "input" or number not in viewed)
            return host.Ref(first[kind] + number, whole, place.offset, place.sizes, place.strides, place.dtype)

        def refs(value: Any) -> Any:
            return ref(value) if isinstance(value, Place) else [*map(refs, value)] if type(value) is list else value

        program = host.Program(len(self.inputs), self._constants, device)
        for kind, *step in self._steps:
            if kind == "empty":
                number, like = step
                program.empty(first["created"] + number, like.shape, like.stride(), like.dtype, like.device)
            elif kind == "launch":
                function, grid, threads, shared, parameters = step
                program.launch(function, grid, threads, shared, refs(parameters))
            else:
                name, overload, arguments, outputs = step
                made = [-1 if number is None else first["created"] + number for number in outputs]
                program.call(name, overload, refs(arguments), made)
        program.returns([None if place is None else ref(place, result=True) for place in places])
        return program

    def _base(self, slot: tuple[str, int]) -> Tensor:
        kind, number = slot
        return {"input": self.inputs, "constant": self._constants, "created": self._created}[kind][number]

    def _add(self, tensor: Tensor, kind: str, tensors: list[Tensor]) -> int:
        self._slots[_storage(tensor)] = [(kind, len(tensors))]
        tensors.append(tensor)
        return len(tensors) - 1

    def _note(self, func, args, kwargs, outputs) -> None:
        arguments, written = self._arguments(func, args, kwargs)
        found = [outputs] if isinstance(outputs, Tensor) else outputs if isinstance(outputs, (list, tuple)) else None
        if found is None or not all(isinstance(output, Tensor) for output in found):
            if any(isinstance(argument, Place) for argument in arguments):
                raise Refused(f"{func} reads a value")
            return  # of dtypes and numbers alone
        if torch.Tag.dynamic_output_shape in func.tags and not _counted(func, args):
            raise Refused(f"{func} reads values, which decide its output's shape")
        fresh = [_storage(output) not in self._slots for output in found]
        if not any(fresh) and not written:
            return  # a view
        if func in _EMPTY:
            if found[0].numel() == 0:
                self._add(found[0], "constant", self._constants)
            else:
                self._steps.append(("empty", self._add(found[0], "created", self._created), found[0]))
            return
        for place in written:
            if place.slot[0] == "constant" or (place.slot[0] == "input" and func.namespace != _OURS):
                raise Refused(f"{func} writes into {place.slot[0]} {place.slot[1]}")
        made = [
            self._add(output, "created", self._created) if new else None
            for output, new in zip(found, fresh, strict=True)
        ]
        self._steps.append(("call", func._schema.name, func._schema.overload_name, arguments, made))

    def _arguments(self, func, args, kwargs) -> tuple[list, list[Place]]:
        """In the schema's order, tensors as places; and the places that are written to."""
        found, written = [], []
        for i, argument in enumerate(func._schema.arguments):
            value = args[i] if i < len(args) else kwargs.get(argument.name, argument.default_value)
            if isinstance(value, Tensor):
                value = self.place(value)
                if argument.alias_info is not None and argument.alias_info.is_write:
                    written.append(value)
            elif isinstance(value, (list, tuple)) and any(isinstance(item, Tensor) for item in value):
                if not all(isinstance(item, Tensor) for item in value):
                    raise Refused(f"{func} takes a list with None")
                value = [*map(self.place, value)]
                if argument.alias_info is not None and argument.alias_info.is_write:
                    written += value
            found.append(value)
        return found, written

    def _launch(self, kernel, compiled, grid, arguments) -> tuple:
        if compiled is None:
            raise Refused("Triton's interpreter")
        data, signature = compiled.metadata, compiled.src.signature
        asks = ("global_scratch_size", "profile_scratch_size", "launch_cooperative_grid", "launch_pdl")
        if any(getattr(data, name, 0) for name in asks) or data.num_ctas != 1:
            raise Refused(f"{data.name} needs more than a plain launch")
        named = zip(kernel.arg_names, arguments, strict=False)
        parameters = [word for name, value in named for word in self._words(signature[name], value)]
        parameters.extend(_SCRATCH)
        _KERNELS[compiled.function] = compiled
        whole = [*grid, 1, 1][:3]
        return compiled.function, whole, data.num_warps * data.warp_size, data.shared, parameters

    def _words(self, kind: Any, value: Any) -> list:
        """What a kernel is given for an argument: nothing for a constant, each of a tuple's parts."""
        if isinstance(kind, tuple):
            return [word for one, part in zip(kind, value, strict=True) for word in self._words(one, part)]
        if kind == "constexpr":
            return []
        return [self.place(value) if isinstance(value, Tensor) else _word(kind, value)]


def _counted(func: Any, args: Sequence) -> bool:
    """Whether this takes elements by their numbers, so that its shape is that of the numbers."""
    return func is torch.ops.aten.index.Tensor and all(
        index is None or index.dtype not in (torch.bool, torch.uint8) for index in args[1]
    )


def _word(kind: str, value: float) -> int:
    """The eight bytes of a parameter, as a number."""
    if kind == "fp32":
        return int.from_bytes(struct.pack("<f", value), "little")
    if kind == "fp64":
        return int.from_bytes(struct.pack("<d", value), "little")
    if kind[0] in "iu" and isinstance(value, int):
        return value & 0xFFFFFFFFFFFFFFFF
    raise Refused(f"a parameter of type {kind}")


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _first(tensor: Tensor) -> int:
    """How many bytes of the storage lie before the tensor."""
    return int(tensor.storage_offset()) * tensor.element_size()


def _layout(tensor: Tensor) -> tuple:
    return tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype
