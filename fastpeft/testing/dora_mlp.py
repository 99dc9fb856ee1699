"""Problems for dora_mlp, solved three ways: fused, eager, exact."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import _backend, ops, reference
from ..ops.dora_mlp import REASONS
from ..reference.lora_mlp import activate
from .accuracy import TRAINING, Ratios, error_vs_eager, worst
from .dora_linear import DoraProblem, eager_dora_linear
from .lora_linear import eager_lora_linear

_TRAINED = ("lora_as", "lora_bs", "magnitudes", "biases")
_GROUPS = ("weights", *_TRAINED)


def eager_dora_mlp(x, weights, lora_as, lora_bs, magnitudes, biases, scales, dropouts, seeds, activation) -> Tensor:
    """What a model does with PEFT's layers in it: the yardstick.

    Args:
        x: the input ``[..., K]``.
        weights: of gate, up and down, as every list.
        lora_as: A of each.
        lora_bs: B of each.
        magnitudes: of each, or None for LoRA.
        biases: of each, or None.
        scales: factors of B A.
        dropouts: probabilities of dropping an element, in [0, 1).
        seeds: of the masks, integers.
        activation: "silu", "gelu" or "gelu_tanh".
    """

    def projection(x: Tensor, p: int) -> Tensor:
        tensors, settings = (x, weights[p], lora_as[p], lora_bs[p]), (biases[p], scales[p], dropouts[p], seeds[p])
        if magnitudes[p] is None:
            return eager_lora_linear(*tensors, *settings)
        return eager_dora_linear(*tensors, magnitudes[p], *settings)

    return projection(activate(projection(x, 0), activation) * projection(x, 1), 2)


@dataclass(frozen=True)
class DoraMlpProblem:
    """Operands and incoming gradient of ``dora_mlp``.

    ``fused``, ``eager`` and ``exact`` return the output and the gradients by name: y, dx, dlora_as0, dmagnitudes0, ...

    Attributes:
        x: the input ``[..., K]``.
        weights: of gate, up and down, as every list; frozen.
        lora_as: A of each.
        lora_bs: B of each.
        magnitudes: of each, or None for LoRA.
        biases: of each, or None; trained.
        dy: the incoming gradient.
        scales: factors of B A.
        dropouts: probabilities of dropping an element, in [0, 1).
        seeds: of the masks.
        activation: "silu", "gelu" or "gelu_tanh".
    """

    x: Tensor
    weights: tuple[Any, ...]
    lora_as: tuple[Tensor, ...]
    lora_bs: tuple[Tensor, ...]
    magnitudes: tuple[Tensor | None, ...]
    biases: tuple[Tensor | None, ...]
    dy: Tensor
    scales: tuple[float, ...] = (0.5, 1.0, 0.25)
    dropouts: tuple[float, ...] = (0.0, 0.0, 0.0)
    seeds: tuple[int, ...] = (1234567, 1234568, 1234569)
    activation: str = "silu"

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
        bias: bool = True,
        activation: str = "silu",
        seed: int = 0,
    ) -> "DoraMlpProblem":
        """Random operands for x of ``shape``, each projection as ``DoraProblem.make`` has it.

        Args:
            shape: x's, of which the last is K.
            inner: I, the intermediate width.
            out: N.
            ranks: of gate, up and down.
            dtype: of the operands.
            adapter_dtype: of A, B and the magnitudes; None: the operands'.
            device: where the tensors lie.
            dropout: probability of dropping an element, in [0, 1).
            bias: whether there are biases.
            activation: "silu", "gelu" or "gelu_tanh".
            seed: of the draws. The same arguments give the same problem.
        """
        k, lead = shape[-1], shape[:-1]
        sizes = zip((k, k, inner), (inner, inner, out), ranks, strict=True)
        gate, up, down = (
            DoraProblem.make((*lead, k), n, r, dtype, adapter_dtype, device, dropout, bias, seed + p)
            for p, (k, n, r) in enumerate(sizes)
        )
        columns: dict[str, Any] = {
            name + "s": tuple(getattr(part, name) for part in (gate, up, down))
            for name in ("weight", "lora_a", "lora_b", "magnitude")
        }
        biases = gate.bias, up.bias, down.bias
        return cls(
            x=gate.x, **columns, biases=biases, dy=down.dy, dropouts=(dropout,) * 3, activation=activation
        )  # fmt: skip

    def fused(self, backend: str | None = None) -> dict[str, Tensor]:
        """Output and gradients of fastpeft's op.

        Args:
            backend: which serves the op; None for the automatic choice.
        """

        def call(*operands):
            *lists, activation = operands
            return functools.partial(ops.dora_mlp, activation=activation, backend=backend)(*lists)

        return self.differentiate(call)

    def eager(self, function: Callable = eager_dora_mlp) -> dict[str, Tensor]:
        """Output and gradients of the yardstick.

        Args:
            function: what is called in place of ``eager_dora_mlp``, with its arguments.
        """
        return self.differentiate(function)

    def exact(self) -> dict[str, Tensor]:
        def definition(*operands):
            *lists, seeds, activation = operands
            call: Any = functools.partial(reference.dora_mlp, activation=activation)
            return call(*lists, torch.tensor(seeds, device=lists[0].device))

        return self.map(lambda t: t.detach().double()).eager(definition)

    def map(self, function: Callable[[Tensor], Tensor]) -> "DoraMlpProblem":
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
            call: takes all of ``eager_dora_mlp``'s arguments and returns y.
        """
        groups, leaves = [], {"dx": self.x.detach().requires_grad_()}
        for name in _TRAINED:
            groups.append([None if t is None else t.detach().requires_grad_() for t in getattr(self, name)])
            leaves |= {f"d{name}{p}": t for p, t in enumerate(groups[-1]) if t is not None}
        y = call(leaves["dx"], self.weights, *groups, self.scales, self.dropouts, self.seeds, self.activation)
        grads = torch.autograd.grad(y, list(leaves.values()), self.dy)
        return {"y": y.detach()} | dict(zip(leaves, grads, strict=True))


def ratios(problem: DoraMlpProblem, backend: str | None = None) -> dict[str, Ratios]:
    """``error_vs_eager`` of the output and every gradient of the problem."""
    fused, eager, exact = problem.fused(backend), problem.eager(), problem.exact()
    return {name: error_vs_eager(fused[name], eager[name], exact[name]) for name in exact}


def check(device: torch.device | str) -> Iterator[tuple[str, torch.dtype, Ratios]]:
    """Every dtype that training uses, on each backend that serves ``device``; the worst ratios of each.

    Without biases, as lora_mlp's: of so few rows one decides the largest error of a bias's gradient.
    """
    for dtype, adapter in TRAINING:
        sizes = (4, 67, 224), 320, 224, (16, 8, 12)
        problem = DoraMlpProblem.make(*sizes, dtype, adapter, device, dropout=0.1, bias=False)
        for backend in _backend.ORDER:
            if REASONS[backend](problem.x, problem.lora_as, problem.weights) is None:
                found = worst(ratios(problem, backend).values())
                note = "" if dtype == adapter else ", fp32 adapters"
                yield f"dora_mlp {backend}{note}", dtype, found
