"""Who reads or writes outside its memory, or reads what nobody wrote."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def guarded(tensor: Tensor, width: int = 32, fill: float = torch.nan) -> tuple[Tensor, Callable[[], None]]:
    """A copy of ``tensor`` as a view in the middle of a larger buffer, and a function that checks the buffer.

    In every dimension ``width`` elements of ``fill`` lie before and after. A kernel that reads past an edge takes in
    NaN; the check raises AssertionError if anything outside the view was written.

    Args:
        tensor: of a floating-point dtype; it is copied.
        width: of the guard, in elements.
        fill: what the guard holds.
    """
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"guarded: tensor has dtype {tensor.dtype}, expected a floating-point dtype")
    inside = tuple(slice(width, width + size) for size in tensor.shape)
    buffer = tensor.new_full([size + 2 * width for size in tensor.shape], fill)
    buffer[inside] = tensor.detach()

    def check() -> None:
        now = buffer.clone()
        now[inside] = fill
        wrong = now.isfinite() if fill != fill else now != fill
        if wrong.any():
            raise AssertionError(f"guarded: {int(wrong.sum())} elements outside the tensor were written")

    return buffer[inside], check


class poisoned(TorchDispatchMode):
    """Context in which uninitialised memory, and a guard on both sides of it, is NaN (integers: the lowest value).

    Covers torch.empty, empty_like, empty_strided, new_empty and new_empty_strided, also in backward. What an op should
    have written and did not stays NaN; leaving the context raises AssertionError if an element before or after one of
    these allocations was written.
    """

    # Elements: a tile that misses its mask ends within, so that the check sees it before the heap is corrupted; and a
    # multiple of 64 keeps the alignment that kernels specialise on.
    GUARD = 4096
    _ALLOCATIONS = frozenset(
        getattr(torch.ops.aten, name)
        for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
    )

    def __init__(self):
        super().__init__()
        self._buffers = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket not in self._ALLOCATIONS or result.dtype.is_complex or result.dtype == torch.bool:
            return result
        used = 1 + sum((size - 1) * stride for size, stride in zip(result.shape, result.stride(), strict=True))
        used = used if result.numel() else 0
        poison = torch.nan if result.dtype.is_floating_point else torch.iinfo(result.dtype).min
        buffer = torch.full((used + 2 * self.GUARD,), poison, dtype=result.dtype, device=result.device)
        self._buffers.append((buffer, used, poison))
        # set_, since a view would be treated as one by autograd.
        return torch.empty(0, dtype=result.dtype, device=result.device).set_(
            buffer.untyped_storage(), self.GUARD, result.shape, result.stride()
        )

    def __exit__(self, kind, value, trace):
        super().__exit__(kind, value, trace)
        for buffer, used, poison in self._buffers if kind is None else ():
            outside = torch.cat([buffer[: self.GUARD], buffer[self.GUARD + used :]])
            if not (outside.isnan() if poison != poison else outside == poison).all():
                raise AssertionError(f"poisoned: a write outside an allocation of {used} elements, {buffer.dtype}")
