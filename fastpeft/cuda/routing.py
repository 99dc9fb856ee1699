"""The routing of a batch, which csrc/ reads but does not make: the Triton kernels do."""

from torch import Tensor


def route(token_slots: Tensor, slots: int, tile: int, tiles: int) -> tuple[Tensor, Tensor, Tensor]:
    """As ``fastpeft.kernels.routing.route``."""
    from ..kernels import routing

    return routing.route(token_slots, slots, tile, tiles)
