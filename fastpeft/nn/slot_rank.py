"""The rank at which an adapter is computed in a slot of a bank, which decides its bits."""


def slot_rank(rank: int, max_rank: int, on_cpu: bool) -> int:
    """Its own on a GPU; on a CPU 8, 16, 32, ...: adapters of one rank are taken together there.

    So few are apart, and less than half of what is computed is zeros.

    Args:
        rank: the adapter's.
        max_rank: the slots' size.
        on_cpu: where the slots are.
    """
    return min(max(8, 1 << (rank - 1).bit_length()), max_rank) if on_cpu else rank
