"""The launchers of csrc/lora_linear.cu, run on the emulated GPU, on CPU tensors that lie between guard bands."""

import ctypes
import mmap

import torch
from torch import Tensor

from . import build

DTYPES = {torch.bfloat16: 0, torch.float16: 1}
ROWS, LEFT, RIGHT = 3, 8, 8  # the widths of the guard bands


def before_a_fence(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """A matrix of NaN at the end of its memory: who reads or writes past it dies."""
    size = rows * columns * dtype.itemsize
    end = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, end + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + end), ctypes.c_size_t(mmap.PAGESIZE), 0):  # PROT_NONE
        raise OSError("mprotect failed")
    matrix = torch.frombuffer(memory, dtype=dtype, count=rows * columns, offset=end - size).view(rows, columns)
    return matrix.fill_(torch.nan)


class Guarded:
    """A copy as TMA wants it, rows at multiples of 16 bytes, NaN around it. Rows too far or too near stay."""

    def __init__(self, value: Tensor):
        rows, columns = value.shape
        if not columns <= value.stride(0) <= 2**30:
            self.view, self.buffer, self.before = value, value, value.clone()
            return
        self.buffer = before_a_fence(rows + 2 * ROWS, LEFT + -(-columns // 8) * 8 + RIGHT, value.dtype)
        self.view = self.buffer[ROWS : ROWS + rows, LEFT : LEFT + columns]
        self.view.copy_(value)
        self.before = self.buffer.clone()

    def check(self, written: bool) -> None:
        """Nothing changed; where ``written``, nothing outside the matrix."""
        before, now = self.before.clone(), self.buffer.clone()
        if written:
            rows, columns = self.view.shape
            for buffer in (before, now):
                buffer[ROWS : ROWS + rows, LEFT : LEFT + columns] = 0
        if not torch.equal(before.view(torch.int16), now.view(torch.int16)):
            raise AssertionError("the kernel wrote outside of its output")


class Launchers:
    """Each method allocates its outputs, full of NaN, and returns them. A launch that fails raises RuntimeError."""

    def __init__(self):
        self.library = ctypes.CDLL(str(build.library("lora_linear")))
        self.library.emulator_error_text.restype = ctypes.c_char_p
        self.library.fastpeft_lora_linear_workspace.restype = ctypes.c_int64
        self.set()

    def set(self, seed: int = 1, clusters: int = 2, resident: int = 0) -> None:
        """The order of events; how many clusters the machine says it holds, and how many it does hold (0: all)."""
        self.library.emulator_set(ctypes.c_uint64(seed), clusters, resident)

    def forward(self, x, w, s, b, bias=None, config=0) -> Tensor:
        y = x.new_full((x.shape[0], w.shape[0]), torch.nan)
        bias = _vector(bias)
        rest = [_pointer(bias), y, *y.shape, x.shape[1], s.shape[1], _dtype(x), ctypes.c_int(config), None]
        return self._call("", [x, w, s, b], rest)[0]

    def backward(self, dy, w, ds, a, seed=None, threshold=0, inverse_keep=1.0, config=0) -> Tensor:
        dx = dy.new_full((dy.shape[0], w.shape[1]), torch.nan)
        sizes = [dy.shape[0], *w.shape, ds.shape[1]]
        rest = [dx, *sizes, *_mask(seed, threshold, inverse_keep), _dtype(dy), ctypes.c_int(config), None]
        return self._call("_backward", [dy, w, ds, a], rest)[0]

    def down(self, x, w, a, b, workspace, bias=None, scale=1.0, seed=None, threshold=0, inverse_keep=1.0):
        """y and s."""
        y, s = (x.new_full((x.shape[0], n), torch.nan) for n in (w.shape[0], a.shape[0]))
        bias = _vector(bias)
        sizes = [*y.shape, x.shape[1], a.shape[0], ctypes.c_float(scale)]
        mask = _mask(seed, threshold, inverse_keep)
        rest = [_pointer(bias), s, y, *sizes, *mask, _pointer(workspace), _dtype(x), None]
        return self._call("_down", [x, w, a, b], rest)[::-1]

    def workspace(self, rows: int) -> Tensor:
        return torch.zeros(self.library.fastpeft_lora_linear_workspace(ctypes.c_int64(rows)) // 4, dtype=torch.int32)

    def _call(self, name, inputs, rest):
        """Tensors become guarded copies, as pointer and stride; those among ``rest`` are outputs, and returned."""
        inputs = [Guarded(t) for t in inputs]
        rest = [Guarded(value) if isinstance(value, Tensor) else value for value in rest]
        arguments = []
        for value in (*inputs, *rest):
            if isinstance(value, Guarded):
                arguments += [_pointer(value.view), ctypes.c_int64(value.view.stride(0))]
            else:
                arguments.append(ctypes.c_int64(value) if isinstance(value, int) else value)
        if code := getattr(self.library, f"fastpeft_lora_linear{name}")(*arguments):
            raise RuntimeError(f"{code}: {self.library.emulator_error_text().decode()}")
        for t in inputs:
            t.check(written=False)
        outputs = [value for value in rest if isinstance(value, Guarded)]
        for t in outputs:
            t.check(written=True)
        return [t.view.clone() for t in outputs]


def _vector(values: Tensor | None) -> Tensor | None:
    """A copy at no particular alignment, before a fence."""
    if values is None:
        return None
    return before_a_fence(1, values.numel(), values.dtype)[0].copy_(values)


def _mask(seed: Tensor | None, threshold: int, inverse_keep: float) -> list:
    return [_pointer(seed), ctypes.c_uint32(threshold), ctypes.c_float(inverse_keep)]


def _dtype(t: Tensor) -> ctypes.c_int:
    return ctypes.c_int(DTYPES[t.dtype])


def _pointer(t: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if t is None else t.data_ptr())
