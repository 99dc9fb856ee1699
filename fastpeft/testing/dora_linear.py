"""Problems for dora_linear, solved three ways: fused, eager, exact."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _backend, ops, reference
from ..ops.dora_linear import REASONS
from .accuracy import TRAINING, Ratios, error_vs_eager, worst

_TENSORS = ("x", "lora_a", "lora_b", "magnitude", "bias")


def eager_dora_linear(
    x, weight, lora_a, lora_b, magnitude, bias=None, scale=1.0, dropout=0.0, seed=0, norm=None
) -> Tensor:
    """What PEFT does, step by step: the yardstick.

    The base product on dropped x is taken in x's dtype, as the other one is. PEFT takes it in the adapters', which for
    float32 ones beside 16-bit x is a product in float32.

    Args:
        x: the input ``[..., K]``.
        weight: ``[N, K]``.
        lora_a: ``[r, K]``.
        lora_b: ``[N, r]``.
        magnitude: ``[N]``.
        bias: ``[N]``, or None.
        scale: factor of B A.
        dropout: probability of dropping an element, in [0, 1).
        seed: of the mask, an integer or an int64 tensor of one element.
        norm: ``[N]``, the rows' norms where they are known.
    """
    y = F.linear(x, weight, bias)
    branch = x.to(lora_a.dtype)
    wide = weight.to(branch.dtype)
    if norm is None:
        norm = torch.linalg.norm(wide + scale * (lora_b @ lora_a).detach(), dim=1)
    gain = magnitude / norm.to(branch.dtype).detach()
    if dropout:
        seed = torch.as_tensor(seed, dtype=torch.int64, device=x.device)
        mask = reference.keep_mask(seed, dropout, x[..., 0].numel(), x.shape[-1], branch.dtype)
        branch = branch * (mask.view(x.shape) * reference.inverse_keep(dropout))
        base = F.linear(branch.to(x.dtype), weight)
    else:
        base = y if bias is None else y - bias
    low = F.linear(F.linear(branch, lora_a), lora_b)
    return (y + ((gain - 1) * base + gain * low * scale)).to(x.dtype)


@dataclass(frozen=True)
class DoraProblem:
    """Operands and incoming gradient of ``dora_linear``.

    ``fused``, ``eager`` and ``exact`` return the output and the gradients by name: y, dx, dlora_a, dlora_b, ...

    Attributes:
        x: the input ``[..., K]``.
        weight: ``[N, K]``.
        lora_a: ``[r, K]``.
        lora_b: ``[N, r]``.
        magnitude: ``[N]``.
        bias: ``[N]``, or None.
        dy: the incoming gradient ``[..., N]``.
        scale: factor of B A.
        dropout: probability of dropping an element, in [0, 1).
        seed: of the mask.
    """

    x: Tensor
    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    magnitude: Tensor
    bias: Tensor | None
    dy: Tensor
    scale: float = 0.5
    dropout: float = 0.0
    seed: int = 1234567

    @classmethod
    def make(
        cls,
        shape: tuple[int, ...],
        out: int = 24,
        rank: int = 8,
        dtype: torch.dtype = torch.float32,
        adapter_dtype: torch.dtype | None = None,
        device="cpu",
        dropout: float = 0.0,
        bias: bool = True,
        seed: int = 0,
    ) -> "DoraProblem":
        """Random operands for x of ``shape``; B A is of about half of W's size, the gain between 0.5 and 1.5.

        Args:
            shape: x's, of which the last is K.
            out: N.
            rank: of A and B.
            dtype: of the operands.
            adapter_dtype: of A, B and the magnitude; None: the operands'.
            device: where the tensors lie.
            dropout: probability of dropping an element, in [0, 1).
            bias: whether there is one.
            seed: of the draws. The same arguments give the same problem.
        """
        adapter, k = adapter_dtype or dtype, shape[-1]
        generator = torch.Generator().manual_seed(seed)

        def draw(*size, spread=1.0, to=dtype):
            return (torch.randn(size, generator=generator, dtype=torch.float64) * spread).to(device, to)

        weight, gain = draw(out, k, spread=k**-0.5), torch.rand(out, generator=generator, dtype=torch.float64) + 0.5
        return cls(
            x=draw(*shape),
            weight=weight,
            lora_a=draw(rank, k, spread=k**-0.5, to=adapter),
            lora_b=draw(out, rank, spread=rank**-0.5, to=adapter),
            magnitude=(weight.double().norm(dim=1) * gain.to(device)).to(adapter),
            bias=draw(out) if bias else None,
            dy=draw(*shape[:-1], out),
            dropout=dropout,
        )

    def fused(self, backend: str | None = None) -> dict[str, Tensor]:
        """Output and gradients of fastpeft's op.

        Args:
            backend: which serves the op; None for the automatic choice.
        """
        return self.differentiate(functools.partial(ops.dora_linear, backend=backend))

    def eager(self, function: Callable = eager_dora_linear) -> dict[str, Tensor]:
        """Output and gradients of the yardstick.

        Args:
            function: what is called in place of ``eager_dora_linear``, with its arguments.
        """
        return self.differentiate(function)

    def exact(self) -> dict[str, Tensor]:
        def definition(x, weight, lora_a, lora_b, magnitude, bias, scale, dropout, seed):
            seed = torch.tensor([seed], device=x.device)
            return reference.dora_linear(x, weight, lora_a, lora_b, magnitude, bias, scale, dropout, seed)

        return self.map(lambda t: t.detach().double()).eager(definition)

    def map(self, function: Callable[[Tensor], Tensor]) -> "DoraProblem":
        """The same problem with ``function`` applied to every tensor.

        Args:
            function: takes a tensor and returns one, of another dtype or device, say.
        """
        given = {name: getattr(self, name) for name in (*_TENSORS, "weight", "dy")}
        changed: dict[str, Any] = {name: function(t) for name, t in given.items() if t is not None}
        return replace(self, **changed)

    def differentiate(self, call: Callable) -> dict[str, Tensor]:
        """Run ``call`` and backward from ``dy``.

        Args:
            call: takes x, weight, A, B, magnitude, bias, scale, dropout and seed, and returns y.
        """
        given = {name: getattr(self, name) for name in _TENSORS}
        leaves = {name: t.detach().requires_grad_() for name, t in given.items() if t is not None}
        x, *rest = (leaves.get(name) for name in _TENSORS)
        y = call(x, self.weight, *rest, self.scale, self.dropout, self.seed)
        grads = torch.autograd.grad(y, list(leaves.values()), self.dy)
        return {"y": y.detach()} | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def ratios(problem: DoraProblem, backend: str | None = None) -> dict[str, Ratios]:
    """``error_vs_eager`` of the output and every gradient of the problem."""
    fused, eager, exact = problem.fused(backend), problem.eager(), problem.exact()
    return {name: error_vs_eager(fused[name], eager[name], exact[name]) for name in exact}


def check(device: torch.device | str) -> Iterator[tuple[str, torch.dtype, Ratios]]:
    """Every dtype that training uses, on each backend that serves ``device``; the worst ratios of each."""
    for dtype, adapter in TRAINING:
        problem = DoraProblem.make((4, 67, 512), 384, 16, dtype, adapter, device, dropout=0.1)
        for backend in _backend.ORDER:
            if REASONS[backend](problem.x, [problem.lora_a]) is None:
                found = worst(ratios(problem, backend).values())
                note = "" if dtype == adapter else ", fp32 adapters"
                yield f"dora_linear {backend}{note}", dtype, found
