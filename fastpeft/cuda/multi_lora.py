"""LoRA for a batch of many adapters by csrc/multi_lora.cu: one launch where devices have clusters, else two.

    y[t] += (scale · x[t] A[slot]ᵀ) B[slot]ᵀ       for up to 256 tokens and up to 4 slices of one x

Sums are float32; S is multiplied with B as two TF32 terms, 21 bits. Both paths add in one order and give the same bits;
a token's are the same in every batch. They are not the Triton kernels' bits: those cut K in other places. The gradients
are the Triton kernels'.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _tape

MAX_TOKENS = 256
MAX_COLUMNS = 512  # of S, every slice's R rounded up to 16
DTYPES = (torch.bfloat16, torch.float16)  # in the order of csrc's numbers
PATHS = ("cluster", "planes")
_BLOCKS = 8  # partial sums of a token
_TOKENS = 16  # of a work item
_CLUSTERS = (9, 10, 12)  # first figures of the capabilities that csrc is compiled for with clusters

_reading_ahead = False


@dataclass(frozen=True)
class Config:
    """``path``: one launch of clusters, or two with partial sums in memory; ``columns`` of S at a time."""

    path: str
    columns: int


def config(columns: int, capability: int) -> Config:
    """The kernels for S with so many columns, a multiple of 16."""
    at_a_time = 16 if columns <= 16 else 32
    # sm_12x has 99 KiB of shared memory a block, the others 227; 384 columns take 97.
    room = 384 if capability // 10 == 12 else MAX_COLUMNS
    return Config("cluster" if capability // 10 in _CLUSTERS and columns <= room else "planes", at_a_time)


@contextlib.contextmanager
def reading_ahead() -> Iterator[None]:
    """Launches inside may start while the kernel ahead in the stream still runs, and fetch what does not depend on it.

    Before they wait for that kernel they read the routing, the ranks and the adapters' weights. Whoever asks for this
    promises that those were written before an ordinarily launched kernel that also lies ahead: the base's GEMM, say.
    A slot loaded, or tokens routed, by the very kernel ahead would be read too early.
    """
    global _reading_ahead
    before, _reading_ahead = _reading_ahead, True
    try:
        yield
    finally:
        _reading_ahead = before


def planes(k: int, tile: int, dtype: torch.dtype) -> int:
    """How many sums make up S: it is kept whole."""
    return 1


def add_(ys: Sequence[Tensor], x: Tensor, lora_as: Sequence[Tensor], lora_bs: Sequence[Tensor], routing, slots) -> None:
    """``y_p += S_p B_pᵀ`` for each token that has an adapter, in place."""
    _run(ys, x, lora_as, lora_bs, routing, slots, None)


def forward(
    ys: Sequence[Tensor], x: Tensor, lora_as: Sequence[Tensor], lora_bs: Sequence[Tensor], routing, slots
) -> Tensor:
    """``add_``, which also returns S for the backward pass: ``[1, T, R]``, R summed over the slices."""
    s = x.new_empty(1, x.shape[0], sum(a.shape[1] for a in lora_as), dtype=torch.float32)
    _run(ys, x, lora_as, lora_bs, routing, slots, s)
    return s


def backward(dys, x, s, lora_as, lora_bs, routing, slots, need_dx, need_da, need_db):
    """As ``fastpeft.kernels.multi_lora.backward``."""
    from ..kernels import multi_lora

    return multi_lora.backward(dys, x, s, lora_as, lora_bs, routing, slots, need_dx, need_da, need_db)


def _run(ys, x, lora_as, lora_bs, routing, slots, s):
    if not x.shape[0] or not routing.tiles.shape[1]:
        return
    columns = sum(columns_of(a.shape[1]) for a in lora_as)
    path = config(columns, _capability(x)).path
    items = routing.tiles.shape[1] * (routing.tile // _TOKENS)
    workspace = x.new_empty(_BLOCKS * items * columns * _TOKENS if path == "planes" else 0, dtype=torch.float32)
    numbers = [_slice(y, a, b, slots.of(p)) for p, (y, a, b) in enumerate(zip(ys, lora_as, lora_bs, strict=True))]
    _extension().multi_lora(
        x.data_ptr(), x.stride(0), x.shape[1],
        routing.order.data_ptr(), routing.starts.data_ptr(), routing.tiles.data_ptr(), routing.tiles.stride(0),
        routing.tiles.shape[1], routing.tile, numbers,
        0 if s is None else s.data_ptr(), 0 if s is None else s.stride(1), workspace.data_ptr(),
        DTYPES.index(x.dtype), PATHS.index(path), _reading_ahead, *_place(x),
    )  # fmt: skip


def columns_of(rank: int) -> int:
    """Columns of S that a slice takes: its R, rounded up to what the tensor cores multiply at a time."""
    return (rank + 15) // 16 * 16


def _slice(y, a, b, slots):
    ranks = 0 if slots.ranks is None else slots.ranks.data_ptr()
    return (
        a.data_ptr(), b.data_ptr(), y.data_ptr(), slots.scales.data_ptr(), ranks,
        a.stride(0), a.stride(1), b.stride(0), b.stride(1), y.stride(0), a.shape[1], b.shape[1],
    )  # fmt: skip


def describe(x: Tensor, lora_as: Sequence[Tensor], *_) -> list[str]:
    """The kernels of a call, for ``fastpeft.explain``."""
    columns = sum(columns_of(a.shape[1]) for a in lora_as)
    chosen = config(columns, _capability(x))
    launches = "one launch" if chosen.path == "cluster" else "two launches"
    return [f"{chosen}: {launches}; gradients by the Triton kernels"]


def _extension():
    import fastpeft._C

    _tape.unrecorded("the launchers of fastpeft._C")
    return fastpeft._C


def _capability(x: Tensor) -> int:
    from .. import _backend

    return _backend.capability(x.device)


def _place(x: Tensor) -> tuple[int, int]:
    """The device and its current stream."""
    return x.device.index, torch.cuda.current_stream(x.device).cuda_stream
