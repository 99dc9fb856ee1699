"""Stands in for fastpeft._C: its ``multi_lora`` runs the kernel's own source on the emulated machine."""

import ctypes

from tests.cuda.emulator import build

pointer, stride, number = ctypes.c_uint64, ctypes.c_int64, ctypes.c_int32


class Slice(ctypes.Structure):
    """As multi_lora::Slice in csrc/multi_lora.h."""

    _fields_ = (
        *((name, pointer) for name in "a b y scales ranks".split()),
        *((f"stride_{name}", stride) for name in "as ar bs bn ym".split()),
        *((name, number) for name in "rank width aligned_b aligned_y".split()),
    )


class Params(ctypes.Structure):
    """As multi_lora::Params."""

    _fields_ = (
        ("slices", Slice * 4),
        *((name, pointer) for name in "x order starts tiles s planes".split()),
        *((f"stride_{name}", stride) for name in "xm tiles sm".split()),
        *((name, number) for name in "k slice_count tile tile_count items columns aligned_k".split()),
    )


class Fault(RuntimeError):
    """What a GPU would answer with a hang, a trap or wrong numbers."""


class Extension:
    """fastpeft._C with an emulated GPU; ``seed`` orders its events, ``calls`` tells what was asked for."""

    def __init__(self):
        self.library = ctypes.CDLL(str(build.library("multi_lora")))
        self.library.emulator_error_text.restype = ctypes.c_char_p
        self.seed, self.ahead, self.calls = 1, [], []

    def multi_lora(
        self, x, stride_xm, k, order, starts, tiles, stride_tiles, tile_count, tile, slices, s, stride_sm, planes,
        dtype, path, early, device, stream,
    ):  # fmt: skip
        """The binding's own signature."""
        p = Params(
            x=x, order=order, starts=starts, tiles=tiles, s=s, planes=planes, stride_xm=stride_xm,
            stride_tiles=stride_tiles, stride_sm=stride_sm, k=k, slice_count=len(slices), tile=tile,
            tile_count=tile_count,
        )  # fmt: skip
        for i, numbers in enumerate(slices):
            p.slices[i] = Slice(*numbers)
        self.calls.append((dtype, path, early))
        self.library.emulator_set(ctypes.c_uint64(self.seed), 2, 1)  # one cluster at a time takes the least memory
        for to, source in self.ahead:
            addresses = (ctypes.c_void_p(t.data_ptr()) for t in (to, source))
            self.library.emulator_ahead(*addresses, ctypes.c_size_t(to.numel() * to.element_size()))
        if self.library.fastpeft_multi_lora(ctypes.byref(p), dtype, path, int(early), None):
            raise Fault(self.library.emulator_error_text().decode())
