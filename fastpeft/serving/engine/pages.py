"""The paged KV cache: blocks of ``BLOCK`` tokens that rows take as they grow and give back when they leave.

One allocation holds all layers, ``[blocks, numbers of a block]``; a layer's keys and values are views of it,
``[blocks, BLOCK, heads, D]``, which is the order that paged attention kernels read. Block 0 belongs to nobody.
"""

import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK = 16  # tokens


class Pages:
    """The blocks of one batch of rows.

    Args:
        blocks: how many rows can have.
        shapes: for each layer the shapes ``[heads, D]`` of one token's keys and values, and the dtype.
        device: of the model.
    """

    def __init__(self, blocks: int, shapes: Sequence["LayerShape"], device: torch.device):
        self.blocks = blocks
        self._free = list(range(blocks, 0, -1))
        dtypes = {shape.dtype for shape in shapes}
        if len(dtypes) > 1:
            raise ValueError(f"Batcher: layers keep keys and values in {sorted(map(str, dtypes))}, expected one dtype")
        width = BLOCK * sum(shape.numbers for shape in shapes)
        self._memory = _zeros(blocks + 1, width, dtypes.pop(), device)
        self.layers: list[tuple[Tensor, Tensor]] = []
        start = 0
        for shape in shapes:
            views = []
            for heads, dim in (shape.keys, shape.values):
                end = start + BLOCK * heads * dim
                views.append(self._memory[:, start:end].view(blocks + 1, BLOCK, heads, dim))
                start = end
            self.layers.append((views[0], views[1]))

    @property
    def free(self) -> int:
        """How many blocks nobody has."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """So many blocks, whose numbers are all 0; the caller has seen that they are free."""
        return [self._free.pop() for _ in range(count)]

    def give_back(self, blocks: Sequence[int]) -> None:
        """Blocks that nobody needs any more. They are cleared: what a masked place holds must be a finite number."""
        if blocks:
            self._memory[torch.tensor(blocks, device=self._memory.device)] = 0
            self._free += reversed(blocks)


class LayerShape:
    """What one layer keeps of one token.

    Attributes:
        keys, values: ``(heads, D)`` of each.
        dtype: of both.
        numbers: how many.
    """

    def __init__(self, keys: Tensor, values: Tensor):
        self.keys, self.values = (keys.shape[1], keys.shape[3]), (values.shape[1], values.shape[3])
        self.dtype = keys.dtype
        self.numbers = self.keys[0] * self.keys[1] + self.values[0] * self.values[1]


def token_bytes(shapes: Sequence[LayerShape]) -> int:
    """How many bytes one token takes in all layers."""
    return sum(shape.numbers * shape.dtype.itemsize for shape in shapes)


def blocks_for(tokens: int) -> int:
    """How many blocks hold so many tokens."""
    return -(-tokens // BLOCK)


def _zeros(blocks: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        if device.type != "cpu":
            return torch.zeros(blocks, width, dtype=dtype, device=device)
        # A host gives zeroed memory page by page, when a page is first written to.
        memory = mmap.mmap(-1, blocks * width * dtype.itemsize)
        return torch.frombuffer(memory, dtype=dtype).view(blocks, width)
