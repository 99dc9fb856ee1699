"""A mixed batch to benchmark: whose token each is, the shape, the weights of one layer or of many.

Popularity of the adapters as Punica has it (identical, distinct, uniform, zipf), and base-only, half base and skewed.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import harness

POPULARITIES = ("uniform", "distinct", "identical", "zipf", "skewed", "half base", "base only")


def counts(popularity: str, tokens: int) -> list[int]:
    """Tokens of each adapter; the rest have none."""
    if popularity == "identical":
        return [tokens]
    if popularity == "distinct":
        return [1] * tokens
    if popularity in ("uniform", "half base"):
        tokens = tokens if popularity == "uniform" else tokens // 2
        many = math.ceil(tokens**0.5)
        return [len(range(i, tokens, many)) for i in range(many)]
    if popularity == "zipf":  # each 1.5 times as popular as the next
        found = []
        while sum(found) < tokens:
            found.append(min(math.floor(1.5 ** len(found)), tokens - sum(found)))
        return sorted(found, reverse=True)
    if popularity == "skewed":
        return [1, tokens - 1][: min(tokens, 2)] if tokens > 1 else [1]
    if popularity == "base only":
        return []
    raise ValueError(f"counts: popularity is {popularity!r}, expected one of {', '.join(POPULARITIES)}")


@dataclass(frozen=True)
class Problem:
    """One shape, and who is in the batch. ``rank`` is a number, or "mixed": 8, 16, 32 and 64 in a bank of 64."""

    shape: str
    tokens: int
    rank: str
    popularity: str
    dtype: torch.dtype
    device: torch.device

    @property
    def sizes(self) -> tuple[int, int]:
        k, _, n = self.shape.partition("x")
        return int(k), int(n)

    @property
    def true_ranks(self) -> list[int]:
        used = max(1, len(counts(self.popularity, self.tokens)))
        return [(8, 16, 32, 64)[slot % 4] if self.rank == "mixed" else int(self.rank) for slot in range(used)]

    @property
    def fields(self) -> dict:
        settings = {"rank": self.rank, "adapters": self.popularity}
        return harness.columns("multi_lora", self.shape, self.tokens, self.dtype, **settings)

    def traffic(self, which: str, adapters: bool = True) -> tuple[int, int]:
        """Least (bytes, operations) of one site: x, W and y once; A and B of every adapter in use once."""
        (k, n), size, tokens = self.sizes, self.dtype.itemsize, self.tokens
        moved, operations = size * (tokens * (k + n) + n * k), 2 * tokens * n * k
        if adapters:
            used = list(zip(counts(self.popularity, tokens), self.true_ranks, strict=False))
            moved += sum(size * rank * (k + n) for _, rank in used)
            operations += sum(2 * count * rank * (k + n) for count, rank in used)
        return moved, operations


@dataclass(frozen=True)
class Mix:
    """Who is in the batch: a slot for each token, in no order, and the slots' ranks and scales."""

    token_slots: Tensor
    ranks: Tensor
    scales: Tensor

    @classmethod
    def draw(cls, problem: Problem) -> "Mix":
        members = [slot for slot, count in enumerate(counts(problem.popularity, problem.tokens)) for _ in range(count)]
        members += [-1] * (problem.tokens - len(members))
        order = torch.randperm(problem.tokens, generator=torch.Generator().manual_seed(harness.SEED))
        ranks = torch.tensor(problem.true_ranks, dtype=torch.int32)
        slots, scales = torch.tensor(members, dtype=torch.int32)[order], 0.5 + torch.arange(len(ranks)) % 3
        return cls(*(t.to(problem.device) for t in (slots, ranks, scales.float())))


@dataclass(frozen=True)
class Site:
    """The weights of one layer; padding beyond the true ranks is 0, which engines that read it need."""

    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor

    @classmethod
    def draw(cls, problem: Problem, generator: torch.Generator) -> "Site":
        (k, n), ranks = problem.sizes, problem.true_ranks
        most = max(ranks)

        def normal(*shape, spread):
            drawn = torch.randn(shape, generator=generator, device=problem.device)
            return drawn.mul_(spread).to(problem.dtype)

        a = normal(len(ranks), most, k, spread=k**-0.5)
        b = normal(len(ranks), n, most, spread=0.25 * most**-0.5)
        for slot, rank in enumerate(ranks):
            a[slot, rank:], b[slot, :, rank:] = 0, 0
        return cls(normal(n, k, spread=k**-0.5), a, b)
