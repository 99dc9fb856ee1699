"""Problems for row_linear, solved three ways: fused, eager, exact."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _backend, ops, reference
from ..ops.row_linear import REASONS
from .accuracy import TRAINING, Ratios, error_vs_eager, integer_inputs, worst


def eager_row_linear(x, weight, trained, index, bias=None, columns=False) -> Tensor:
    """What a person writes: train the whole weight, and use the gradient of the chosen part. The yardstick.

    Args:
        x: the input ``[..., K]``.
        weight: ``[N, K]``.
        trained: ``[n, K]``, or ``[N, n]`` for columns.
        index: ``[n]`` int64.
        bias: ``[N]``, or None.
        columns: whether ``trained`` holds columns.
    """
    whole = weight.detach().clone()
    whole = whole.index_copy(int(columns), index, trained.to(weight.dtype))
    return F.linear(x, whole, bias)


@dataclass(frozen=True)
class RowProblem:
    """Operands and incoming gradient of ``row_linear``.

    ``fused``, ``eager`` and ``exact`` return the output and the gradients by name: y, dx, dtrained, dbias.

    Attributes:
        x: the input ``[..., K]``.
        weight: ``[N, K]``; it holds ``trained`` in its place.
        trained: ``[n, K]``, or ``[N, n]`` for columns.
        index: ``[n]`` int64, in any order.
        bias: ``[N]``.
        dy: the incoming gradient ``[..., N]``.
        columns: whether ``trained`` holds columns.
    """

    x: Tensor
    weight: Tensor
    trained: Tensor
    index: Tensor
    bias: Tensor
    dy: Tensor
    columns: bool

    @classmethod
    def make(
        cls,
        shape: tuple[int, ...],
        out: int = 45,
        chosen: int = 7,
        dtype: torch.dtype = torch.float32,
        trained_dtype: torch.dtype | None = None,
        device="cpu",
        columns: bool = False,
        integers: bool = False,
        seed: int = 0,
    ) -> "RowProblem":
        """Random operands for x of ``shape``; the first and the last row (column) are chosen, the order is any.

        Args:
            shape: x's, of which the last is K.
            out: N.
            chosen: n, how many rows or columns are trained.
            dtype: of the operands.
            trained_dtype: of the trained part; None: the operands'.
            device: where the tensors lie.
            columns: whether columns are trained; else rows.
            integers: draw -1, 0 and 1 alone, on which all arithmetic is exact; see ``integer_inputs``.
            seed: of the draws. The same arguments give the same problem.
        """
        k, generator = shape[-1], torch.Generator().manual_seed(seed)
        size = k if columns else out

        def draw(*shape, spread=1.0):
            if integers:
                return integer_inputs(
                    shape, dtype=dtype, device=device, seed=int(torch.randint(1 << 30, (), generator=generator))
                )[0]
            return (torch.randn(shape, generator=generator, dtype=torch.float64) * spread).to(device, dtype)

        ends = torch.tensor(sorted({0, size - 1}))[:chosen]
        inner = 1 + torch.randperm(max(size - 2, 0), generator=generator)[: chosen - len(ends)]
        index = torch.cat([ends, inner])
        index = index[torch.randperm(len(index), generator=generator)].to(device)
        weight = draw(out, k, spread=k**-0.5)
        trained = weight.index_select(int(columns), index).to(trained_dtype or dtype)
        return cls(draw(*shape), weight, trained, index, draw(out), draw(*shape[:-1], out), columns)

    def fused(self, backend: str | None = None) -> dict[str, Tensor]:
        """Outputs and gradients of fastpeft's op.

        Args:
            backend: which serves the op; None for the automatic choice.
        """

        def call(x, weight, trained, index, bias):
            return ops.row_linear(x, weight, trained, index, bias, self.columns, backend)

        return self.differentiate(call)

    def eager(self, function: Callable = eager_row_linear) -> dict[str, Tensor]:
        """Outputs and gradients of the yardstick.

        Args:
            function: what is called in place of ``eager_row_linear``, with its arguments.
        """
        return self.differentiate(lambda *operands: function(*operands, self.columns))

    def exact(self) -> dict[str, Tensor]:
        return self.map(lambda t: t.detach().double()).eager(reference.row_linear)

    def map(self, function: Callable[[Tensor], Tensor]) -> "RowProblem":
        """The same problem with ``function`` applied to every floating-point tensor.

        Args:
            function: takes a tensor and returns one, of another dtype or device, say.
        """
        x, weight, trained, bias, dy = map(function, (self.x, self.weight, self.trained, self.bias, self.dy))
        return replace(self, x=x, weight=weight, trained=trained, bias=bias, dy=dy)

    def differentiate(self, call: Callable) -> dict[str, Tensor]:
        """Run ``call`` and backward from ``dy``.

        Args:
            call: takes x, weight, trained, index and bias, and returns y.
        """
        leaves = [t.detach().requires_grad_() for t in (self.x, self.trained, self.bias)]
        y = call(leaves[0], self.weight, leaves[1], self.index, leaves[2])
        return {"y": y.detach()} | dict(
            zip(("dx", "dtrained", "dbias"), torch.autograd.grad(y, leaves, self.dy), strict=True)
        )


def ratios(problem: RowProblem, backend: str | None = None) -> dict[str, Ratios]:
    """``error_vs_eager`` of the output and of every gradient of the problem."""
    fused, eager, exact = problem.fused(backend), problem.eager(), problem.exact()
    return {name: error_vs_eager(fused[name], eager[name], exact[name]) for name in exact}


def check(device: torch.device | str) -> Iterator[tuple[str, torch.dtype, Ratios]]:
    """Every dtype that training uses, rows and columns, on each backend that serves ``device``; the worst ratios."""
    for columns in (False, True):
        for dtype, trained in TRAINING:
            problem = RowProblem.make((4, 67, 448), 320, 24, dtype, trained, device, columns)
            for backend in _backend.ORDER:
                if REASONS[backend](problem.x, problem.trained, columns) is None:
                    found = worst(ratios(problem, backend).values())
                    note = "" if dtype == trained else ", fp32 trained"
                    yield f"row_linear {'columns' if columns else 'rows'} {backend}{note}", dtype, found
