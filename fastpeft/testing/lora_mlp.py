"""Problems for lora_mlp, solved three ways: fused, eager, exact."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import _backend, ops, reference
from ..ops.lora_mlp import REASONS
from ..reference.lora_mlp import activate
from .accuracy import TRAINING, Ratios, error_vs_eager, worst
from .lora_linear import eager_lora_linear

_GROUPS = ("weights", "lora_as", "lora_bs", "biases")


def eager_lora_mlp(x, weights, lora_as, lora_bs, biases, scales, dropouts, seeds, activation) -> Tensor:
    """What a model does with PEFT's layers in it: the yardstick.

    Args:
        x: the input ``[..., K]``.
        weights: of gate, up and down, as every list.
        lora_as: A of each.
        lora_bs: B of each.
        biases: of each, or None.
        scales: factors of the low-rank terms.
        dropouts: probabilities of dropping an element, in [0, 1).
        seeds: of the masks, integers.
        activation: "silu", "gelu" or "gelu_tanh".
    """
    gate, up, down = zip(weights, lora_as, lora_bs, biases, scales, dropouts, seeds, strict=True)
    return eager_lora_linear(activate(eager_lora_linear(x, *gate), activation) * eager_lora_linear(x, *up), *down)


@dataclass(frozen=True)
class MlpProblem:
    """Operands and incoming gradient of ``lora_mlp``.

    ``fused``, ``eager`` and ``exact`` return the output and the gradients by name: y, dx, dweights0, dlora_as0, ...

    Attributes:
        x: the input ``[..., K]``.
        weights: of gate, up and down, as every list.
        lora_as: A of each.
        lora_bs: B of each.
        biases: of each, or None.
        dy: the incoming gradient.
        scales: factors of the low-rank terms.
        dropouts: probabilities of dropping an element, in [0, 1).
        seeds: of the masks.
        activation: "silu", "gelu" or "gelu_tanh".
        trains_base: whether weights and biases get gradients too; the rows are then not cut into chunks.
    """

    x: Tensor
    weights: tuple[Tensor, ...]
    lora_as: tuple[Tensor, ...]
    lora_bs: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    dy: Tensor
    scales: tuple[float, ...] = (0.5, 1.0, 0.25)
    dropouts: tuple[float, ...] = (0.0, 0.0, 0.0)
    seeds: tuple[int, ...] = (1234567, 1234568, 1234569)
    activation: str = "silu"
    trains_base: bool = False

    @classmethod
    def make(
        cls,
        shape: tuple[int, ...],
        inner: int = 40,
        out: int = 24,
        ranks: tuple[int, int, int] = (8, 4, 6),
        dtype: torch.dtype = torch.float32,
        adapter_dtype: torch.dtype | None = None,
        device="cpu",
        dropout: float = 0.0,
        biases: bool = True,
        activation: str = "silu",
        trains_base: bool = False,
        seed: int = 0,
    ) -> "MlpProblem":
        """Random operands for x of ``shape``; all products are of the size of x, or smaller.

        Args:
            shape: x's, of which the last is K.
            inner: I, the intermediate width.
            out: N.
            ranks: of gate, up and down.
            dtype: of the operands.
            adapter_dtype: of A and B; None: the operands'.
            device: where the tensors lie.
            dropout: probability of dropping an element, in [0, 1).
            biases: whether there are any.
            activation: "silu", "gelu" or "gelu_tanh".
            trains_base: whether weights and biases get gradients too.
            seed: of the draws. The same arguments give the same problem.
        """
        adapter, k = adapter_dtype or dtype, shape[-1]
        generator = torch.Generator().manual_seed(seed)

        def draw(*size, spread=1.0, to=dtype):
            return (torch.randn(size, generator=generator, dtype=torch.float64) * spread).to(device, to)

        sizes = list(zip((inner, inner, out), (k, k, inner), ranks, strict=True))
        return cls(
            x=draw(*shape),
            weights=tuple(draw(n, k, spread=k**-0.5) for n, k, _ in sizes),
            lora_as=tuple(draw(r, k, spread=k**-0.5, to=adapter) for _, k, r in sizes),
            lora_bs=tuple(draw(n, r, spread=r**-0.5, to=adapter) for n, _, r in sizes),
            biases=tuple(draw(n) if biases else None for n, _, _ in sizes),
            dy=draw(*shape[:-1], out),
            dropouts=(dropout,) * 3,
            activation=activation,
            trains_base=trains_base,
        )

    def fused(self, backend: str | None = None) -> dict[str, Tensor]:
        """Output and gradients of fastpeft's op.

        Args:
            backend: which serves the op; None for the automatic choice.
        """
        return self.differentiate(functools.partial(ops.lora_mlp, backend=backend))

    def eager(self, function: Callable = eager_lora_mlp) -> dict[str, Tensor]:
        """Output and gradients of the yardstick.

        Args:
            function: what is called in place of ``eager_lora_mlp``, with its arguments.
        """
        return self.differentiate(function)

    def exact(self) -> dict[str, Tensor]:
        def definition(x, weights, lora_as, lora_bs, biases, scales, dropouts, seeds, activation):
            drawn = torch.tensor(seeds, device=x.device)
            return reference.lora_mlp(x, weights, lora_as, lora_bs, biases, scales, dropouts, drawn, activation)

        return self.map(lambda t: t.detach().double()).eager(definition)

    def map(self, function: Callable[[Tensor], Tensor]) -> "MlpProblem":
        """The same problem with ``function`` applied to every tensor.

        Args:
            function: takes a tensor and returns one, of another dtype or device, say.
        """
        groups: dict[str, Any] = {
            name: tuple(None if t is None else function(t) for t in getattr(self, name)) for name in _GROUPS
        }
        return replace(self, x=function(self.x), dy=function(self.dy), **groups)

    def differentiate(self, call: Callable) -> dict[str, Tensor]:
        """Run ``call`` and backward from ``dy``.

        Args:
            call: takes all of ``eager_lora_mlp``'s arguments and returns y.
        """
        groups, leaves = [], {"dx": self.x.detach().requires_grad_()}
        for name in _GROUPS:
            trained = self.trains_base or name.startswith("lora")
            groups.append([None if t is None else t.detach().requires_grad_(trained) for t in getattr(self, name)])
            leaves |= {f"d{name}{p}": t for p, t in enumerate(groups[-1]) if t is not None and trained}
        y = call(leaves["dx"], *groups, self.scales, self.dropouts, self.seeds, self.activation)
        grads = torch.autograd.grad(y, list(leaves.values()), self.dy)
        return {"y": y.detach()} | dict(zip(leaves, grads, strict=True))


def ratios(problem: MlpProblem, backend: str | None = None) -> dict[str, Ratios]:
    """``error_vs_eager`` of the output and every gradient of the problem."""
    fused, eager, exact = problem.fused(backend), problem.eager(), problem.exact()
    return {name: error_vs_eager(fused[name], eager[name], exact[name]) for name in exact}


def check(device: torch.device | str) -> Iterator[tuple[str, torch.dtype, Ratios]]:
    """Every dtype that training uses, on each backend that serves ``device``; the worst ratios of each."""
    for dtype, adapter in TRAINING:
        problem = MlpProblem.make((4, 67, 224), 320, 224, (16, 8, 12), dtype, adapter, device, dropout=0.1)
        for backend in _backend.ORDER:
            if REASONS[backend](problem.x, problem.lora_as, problem.weights) is None:
                found = worst(ratios(problem, backend).values())
                note = "" if dtype == adapter else ", fp32 adapters"
                yield f"lora_mlp {backend}{note}", dtype, found
