"""A LoRA problem to benchmark: its shape, its argument sets, and a way of computing it that the harness can check.

Checking needs the dropout mask of every provider, ours and others', each with its own random stream. It is read from
the provider itself: with W = 0 and one adapter left, dX is 0 exactly where that adapter's input was dropped.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor

from . import harness, peers
from .harness import FORWARD, Call, Variant

SCALE = 2.0


@dataclass(frozen=True)
class Problem:
    """One shape and its settings."""

    shape: str
    rows: int
    dtype: torch.dtype
    rank: int
    dropout: float
    device: torch.device

    @property
    def sizes(self) -> tuple[int, list[int]]:
        k, _, outs = self.shape.partition("x")
        return int(k), [int(n) for n in outs.split("+")]

    @property
    def op(self) -> str:
        return "lora_linear_shared" if "+" in self.shape else "lora_linear"

    @property
    def fields(self) -> dict:
        settings = {"rank": self.rank, "dropout": self.dropout}
        return harness.columns(self.op, self.shape, self.rows, self.dtype, **settings)

    def traffic(self, which: str, adapter_dtype: torch.dtype | None) -> tuple[int, int]:
        """Least (bytes, operations): in each direction every input is read once and every output written once."""
        k, outs = self.sizes
        m, r, n, size = self.rows, self.rank, sum(outs), self.dtype.itemsize
        directions, products = (1, 1) if which == FORWARD else (2, 3)
        moved = directions * size * (m * k + m * n + n * k)  # x, y, W; then dX, dY, W
        operations = directions * 2 * m * n * k
        if adapter_dtype is not None:
            adapters = r * (len(outs) * k + n)
            operations += products * 2 * m * adapters  # S, its product with B; dS, its product with A; dA, dB
            moved += products * adapter_dtype.itemsize * adapters  # A, B; A, B again and dA, dB
            moved += (directions - 1) * size * m * k  # x again, for dA
        return moved, operations


@dataclass(frozen=True)
class Arguments:
    """One argument set; adapters are float32 masters that a variant may cast when it is bound, off the clock."""

    x: Tensor
    weights: list[Tensor]
    lora_as: list[Tensor]
    lora_bs: list[Tensor]
    dys: list[Tensor]

    @classmethod
    def draw(cls, problem: Problem, seed: int) -> "Arguments":
        generator = torch.Generator(problem.device).manual_seed(seed)
        (k, outs), m, r = problem.sizes, problem.rows, problem.rank

        def normal(*shape: int, spread: float = 1.0, dtype: torch.dtype = problem.dtype) -> Tensor:
            drawn = torch.randn(shape, generator=generator, device=problem.device)
            return drawn.mul_(spread).to(dtype)

        return cls(
            normal(m, k),
            [normal(n, k, spread=k**-0.5) for n in outs],
            [normal(r, k, spread=k**-0.5, dtype=torch.float32) for _ in outs],
            # The low-rank term is then half the size of the base's: an adapter late in training, not its first step.
            [normal(n, r, spread=0.25 * r**-0.5, dtype=torch.float32) for n in outs],
            [normal(m, n) for n in outs],
        )

    def only(self, p: int) -> "Arguments":
        """Without the weights, and with projection p's adapter alone: dX then shows what its dropout kept."""
        zeros = [torch.zeros_like(b) for b in self.lora_bs]
        zeros[p] = self.lora_bs[p]
        return replace(self, weights=[torch.zeros_like(w) for w in self.weights], lora_bs=zeros)


@dataclass(frozen=True)
class Provider:
    """``build(problem, weights, lora_as, lora_bs)`` gives the forward: x -> list of y."""

    name: str
    build: Callable[..., Callable[[Tensor], list[Tensor]]]
    adapter_dtype: torch.dtype | None
    own: bool = False
    inverse_keep: Callable[[float], float] = lambda p: 1 / (1 - p)

    def bind(self, problem: Problem, arguments: Arguments) -> Call:
        x = arguments.x.detach().requires_grad_()
        if self.adapter_dtype is None:
            return Call(partial(self.build(problem, arguments.weights), x), [x], arguments.dys, arguments.weights)
        adapters = [torch.nn.Parameter(t.to(self.adapter_dtype)) for t in (*arguments.lora_as, *arguments.lora_bs)]
        count = len(arguments.weights)
        forward = self.build(problem, arguments.weights, adapters[:count], adapters[count:])
        return Call(partial(forward, x), [x, *adapters], arguments.dys, [*arguments.weights, *adapters])

    def plain(self, problem: Problem, arguments: Arguments, masks: list, dtype: torch.dtype | None) -> list[Tensor]:
        call = self.bind(problem, arguments)
        leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in call.wrt]
        weights, dys = ([t.to(dtype or t.dtype) for t in ts] for ts in (arguments.weights, arguments.dys))
        count = len(weights)
        adapters = [None, None] if self.adapter_dtype is None else [leaves[1 : 1 + count], leaves[1 + count :]]
        factors = [None if mask is None else mask.double() * self.inverse_keep(problem.dropout) for mask in masks]
        ys = peers.plain(leaves[0], weights, *adapters, SCALE, factors)
        return [*ys, *torch.autograd.grad(ys, leaves, dys)]

    def masks(self, problem: Problem, arguments: Arguments) -> list[Tensor | None]:
        """What this provider's dropout keeps after ``torch.manual_seed``, read from dX: a bool mask a projection."""
        count, p = len(arguments.weights), problem.dropout
        if self.adapter_dtype is None or p == 0:
            return [None] * count
        kept = []
        for projection in range(count):
            call = self.bind(problem, arguments.only(projection))
            torch.manual_seed(harness.SEED)
            kept.append(call.both()[0] != 0)
        shares = [1 - mask.double().mean().item() for mask in kept]
        if any(abs(share - p) > 6 * (p * (1 - p) / kept[0].numel()) ** 0.5 for share in shares):
            raise ValueError(f"dropout {p} dropped the shares {shares}")
        return kept

    def variant(self, problem: Problem, draw: Callable[[int], Arguments]) -> Variant:
        masks = cache(lambda: self.masks(problem, draw(0)))
        adapter = None if self.adapter_dtype is None else str(self.adapter_dtype).removeprefix("torch.")
        return Variant(
            self.name,
            bind=lambda i: self.bind(problem, draw(i)),
            plain=lambda dtype: self.plain(problem, draw(0), masks(), dtype),
            traffic=partial(problem.traffic, adapter_dtype=self.adapter_dtype),
            fields={"adapter_dtype": adapter},
            own=self.own,
        )
