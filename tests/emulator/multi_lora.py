"""Stands in for fastpeft._C: its ``multi_lora`` runs the kernel's own source on the emulated machine."""

import ctypes
from pathlib import Path

from emulator import build

HERE = Path(__file__).resolve().parent
pointer, stride, number = ctypes.c_uint64, ctypes.c_int64, ctypes.c_int32


class Slice(ctypes.Structure):
    """As multi_lora::Slice in csrc/multi_lora_params.h."""

    _fields_ = (
        *((name, pointer) for name in "a b y scales ranks".split()),
        *((name, stride) for name in "as ar bs bn ym".split()),
        *((name, number) for name in "rank width aligned_b aligned_y".split()),
    )


class Params(ctypes.Structure):
    """As multi_lora::Params."""

    _fields_ = (
        ("slices", Slice * 4),
        *((name, pointer) for name in "x order starts tiles s planes".split()),
        *((name, stride) for name in "xm tiles_ sm".split()),
        *((name, number) for name in "k slice_count tile tile_count items columns aligned_k".split()),
    )


class Ahead(ctypes.Structure):
    """A copy that the kernel ahead in the stream makes."""

    _fields_ = (("to", pointer), ("source", pointer), ("bytes", ctypes.c_int64))


class Fault(RuntimeError):
    """What a GPU would answer with a hang, a trap or wrong numbers."""


class Extension:
    """fastpeft._C with an emulated GPU of one capability."""

    def __init__(self, library: Path, seed: int = 1):
        self.run = ctypes.CDLL(str(library)).emulated_multi_lora
        self.run.argtypes = [
            ctypes.POINTER(Params), number, number, ctypes.POINTER(Ahead), number, ctypes.c_uint64, ctypes.c_char_p,
        ]  # fmt: skip
        self.seed, self.ahead, self.calls = seed, [], []

    @classmethod
    def build(cls, folder: Path, *flags: str) -> "Extension":
        return cls(build.build(HERE / "multi_lora.cpp", folder / "multi_lora.so", "-shared", "-fPIC", *flags))

    def multi_lora(
        self, x, stride_xm, k, order, starts, tiles, stride_tiles, tile_count, tile, slices, s, stride_sm, planes,
        dtype, path, early, device, stream,
    ):  # fmt: skip
        """The binding's own signature."""
        p = Params(
            x=x, order=order, starts=starts, tiles=tiles, s=s, planes=planes, xm=stride_xm, tiles_=stride_tiles,
            sm=stride_sm, k=k, slice_count=len(slices), tile=tile, tile_count=tile_count,
        )  # fmt: skip
        for i, numbers in enumerate(slices):
            p.slices[i] = Slice(*numbers)
        copies = (Ahead * len(self.ahead))(*self.ahead)
        fault = ctypes.create_string_buffer(256)
        self.calls.append((dtype, path, early))
        if self.run(p, dtype, path, copies, len(copies), self.seed, fault):
            raise Fault(fault.value.decode())
