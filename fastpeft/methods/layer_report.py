"""One line of a report: an adapted layer, fused or not."""

from dataclasses import dataclass

BESIDE = "fused beside its base: "


@dataclass(frozen=True)
class LayerReport:
    """One layer.

    Attributes:
        path: in the model.
        status: "fused"; "fused beside its base" and why, where the frozen layer is called as it is and the fused
            low-rank term is added; or why it is not.
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
        return self.status == "fused" or self.status.startswith(BESIDE)

    def __str__(self) -> str:
        """What became of the layer, without its path."""
        head, _, why = self.status.partition(": ")
        text = f"{head} ({self.backend})" if self.fused else f"not fused: {self.status}"
        text += f", since {why}" if self.fused and why else ""
        partners = ", ".join(path.rpartition(".")[2] for path in self.shares_with)
        return f"{text}, reads x with {partners}" if partners else text
