"""One call of a fused layer computed again by the library's own layer on the same input, and a bound.

The bound is that of sums rounded in any order: two ways to compute ``y`` differ by at most ``2 n eps m``, where ``m``
is what the formula gives for the magnitudes of all its numbers and ``n`` counts the roundings on the way, the length of
the longest sums. Gradients have the same bound, with the gradients of the magnitudes for m. In 16 bits, and where the
formula is no sum of products (a norm, an activation), the bound is the package's promise: an error against float64 of
at most twice the library's own, beside ``n eps`` of the largest number (in 16 bits 2 eps: sums are float32).
"""

import collections
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

WRONG = 1.05 if os.environ.get("FASTPEFT_SUITE_WRONG") == "1" else 1.0  # our low-rank term, made too large on purpose

Compute = Callable[[Sequence[Tensor]], Tensor]


class Comparisons:
    """Counts of what was compared, and a sentence for each that differed by more than its bound."""

    def __init__(self):
        self.counts: collections.Counter = collections.Counter()
        self.worst = 0.0  # difference over bound
        self.problems: list[str] = []
        self.missed: list[str] = []
        self.busy = False

    def write(self) -> None:
        """One file for each process."""
        if self.counts:
            found = {
                "counts": self.counts,
                "worst": self.worst,
                "problems": (self.problems if WRONG == 1 else self.missed)[:20],
            }
            Path(os.environ["FASTPEFT_SUITE_OUT"], f"compared-{os.getpid()}.json").write_text(json.dumps(found))

    def compare(
        self,
        what: str,
        fused: Compute,
        own: Compute,
        leaves: Sequence[Tensor],
        length: int,
        formula: Callable[..., Tensor] | None = None,
        truth: Compute | None = None,
    ) -> None:
        """Forward and gradients.

        Args:
            what: names the call in a problem.
            fused: y by our layer from leaves like ``leaves``.
            own: the same by the library's layer.
            leaves: x first, then what is trained.
            length: of the longest sum.
            formula: y in float64 of leaves, where every other number is the one that is there with this sign.
            truth: or the library's layer in float64, where the formula is no sum of products.
        """
        types = [leaf.dtype for leaf in leaves]
        if torch.is_autocast_enabled("cpu"):
            types.append(torch.get_autocast_dtype("cpu"))
        eps = max(torch.finfo(t).eps for t in types)
        exact = formula is not None and eps <= torch.finfo(torch.float32).eps
        with torch.random.fork_rng(devices=[]), torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            ours, theirs = _with_gradients(fused, leaves), _with_gradients(own, leaves)
            wide = [leaf.detach().double() for leaf in leaves]
            if exact:
                sizes = _with_gradients(lambda w: formula(w, torch.abs), [leaf.abs() for leaf in wide], positive=True)
            else:
                right = truth or (lambda w: formula(w, torch.clone))
                sizes = _with_gradients(right, wide, like=ours[0])
        n = length * eps if eps <= torch.finfo(torch.float32).eps else 2 * eps
        ratios = []
        for actual, right, size in zip(ours, theirs, sizes, strict=True):
            if actual is None or right is None or actual.dtype != right.dtype:
                if actual is not None or right is not None:
                    self.problems.append(f"{what}: one has a gradient or a dtype that the other has not")
                continue
            actual, right, tiny = actual.double(), right.double(), torch.finfo(actual.dtype).tiny
            if exact:
                ratio = (actual - right).abs() / (2 * n * size + tiny)
            else:
                ratio = (actual - size).abs() / (2 * (right - size).abs().max() + n * size.abs().max() + tiny)
            ratios.append(ratio.max().item())
        self.counts["compared"] += 1
        self.counts["compared in 16 bits"] += int(eps > torch.finfo(torch.float32).eps)
        worst = max(ratios)
        self.worst = max(self.worst, worst)
        if not worst <= 1:
            self.counts["noticed"] += 1
            self.problems.append(f"{what}: differs by {worst:.2g} times the bound, y and gradients {ratios}")
        elif WRONG != 1:
            self.missed.append(
                f"{what}: not noticed, {worst:.2g} of the bound; x is at most {leaves[0].abs().max():.2g}"
            )


def _with_gradients(
    compute: Compute, leaves: Sequence[Tensor], positive: bool = False, like: Tensor | None = None
) -> list[Tensor | None]:
    """y, and the gradients of the leaves for a dy that is the same for all of a call (or its magnitude)."""
    fresh = [leaf.detach().clone().requires_grad_(leaf.is_floating_point()) for leaf in leaves]
    with torch.enable_grad():
        y = compute(fresh)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(
            y.dtype if like is None else like.dtype
        )
        wanted = [leaf for leaf in fresh if leaf.requires_grad]
        gradients = iter(torch.autograd.grad(y, wanted, (dy.abs() if positive else dy).to(y.dtype), allow_unused=True))
    return [y.detach(), *(next(gradients) if leaf.requires_grad else None for leaf in fresh)]
