"""For which calls the CUDA kernels are taken unasked: where they were measured and won, and nowhere else."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Measured:
    """One bucket of shapes on one compute capability, and the measurement that puts a kernel there.

    Attributes:
        op: its basename; capability: 90, ...; rows: fewest and most rows of x; k, n: exactly these sizes of the layer;
        largest_rank: most columns of S; why: the row of ``bench/results`` that says so, with its numbers.
    """

    op: str
    capability: int
    rows: tuple[int, int]
    k: int
    n: int
    largest_rank: int
    why: str


TABLE: tuple[Measured, ...] = ()
"""Empty: no CUDA kernel has been timed yet, so automatic choice stays with the portable path everywhere.

What a bucket takes to be here, and to stay; a kernel without any leaves the package:

- ``lora_linear``: on the frozen part alone at least 97 % of cuBLAS's speed, and with the low-rank term faster than the
  portable path (Triton's S, then ``addmm`` with beta = 1);
- ``multi_lora``: at least 1.5 times as fast as the portable two kernels at up to 16 adapters of rank 16.
"""


def measured(
    op: str, capability: int, rows: int, k: int, n: int, rank: int, table: Sequence[Measured] = TABLE
) -> Measured | None:
    """The bucket that these sizes fall into, or None: the portable path."""
    for bucket in table:
        fits = (bucket.op, bucket.capability, bucket.k, bucket.n) == (op, capability, k, n)
        if fits and bucket.rows[0] <= rows <= bucket.rows[1] and rank <= bucket.largest_rank:
            return bucket
    return None
