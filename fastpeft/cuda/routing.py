"""The routing of a batch, which csrc/ reads but does not make: the Triton kernels do."""

from torch import Tensor


def forward(token_slots: Tensor, slots: int, tile: int, tiles: int) -> tuple[Tensor, Tensor, Tensor]:
    """As ``fastpeft.kernels.routing.forward``."""
    from ..kernels import routing

    return routing.forward(token_slots, slots, tile, tiles)
