"""One line of a report: an adapted layer, fused or not."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerReport:
    """One layer.

    Attributes:
        path: in the model.
        status: "fused", or why it is not.
        backend: that would serve the layer on its weight's device; None where it is not fused.
        shares_with: paths of the layers that are computed in the same call when they get the same tensor.
        kind: what the layer is: "LoRA layers", "bottleneck adapters", ...
    """

    path: str
    status: str
    backend: str | None
    shares_with: tuple[str, ...] = ()
    kind: str = "LoRA layers"

    @property
    def fused(self) -> bool:
        return self.status == "fused"
