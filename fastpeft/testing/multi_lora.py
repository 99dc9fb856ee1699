"""Problems for multi_lora and multi_lora_shared, solved three ways: fused, eager, exact."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _backend, ops, reference
from ..ops.multi_lora import REASONS
from ..ops.routing import TILES
from .accuracy import TRAINING, Ratios, error_vs_eager, integer_inputs, worst


def eager_multi_lora(x, lora_a, lora_b, token_slots, scales, ranks, y, dropouts=None, seeds=None) -> Tensor:
    """What PEFT does for a mixed batch: one adapter after another, gathered and added. The yardstick.

    Args:
        x: the input ``[T, K]``.
        lora_a: ``[slots, R, K]``.
        lora_b: ``[slots, N, R]``.
        token_slots: each token's slot ``[T]``, or -1.
        scales: ``[slots]``.
        ranks: true ranks ``[slots]``, or None for R.
        y: what is added to, ``[T, N]``.
        dropouts: a probability for each slot, or None.
        seeds: int64 ``[slots]``, of the masks.
    """
    for slot, scale in enumerate(scales.tolist()):
        tokens = (token_slots == slot).nonzero()[:, 0]
        rank = lora_a.shape[1] if ranks is None else int(ranks[slot])
        if not rank or not len(tokens):
            continue
        branch = x[tokens].to(lora_a.dtype)
        if dropouts is not None and dropouts[slot]:
            mask = reference.keep_mask(seeds[slot], dropouts[slot], len(branch), branch.shape[1], branch.dtype)
            branch = branch * (mask * reference.inverse_keep(dropouts[slot]))
        delta = F.linear(F.linear(branch, lora_a[slot, :rank]), lora_b[slot, :, :rank]) * scale
        y = y.index_add(0, tokens, delta.to(y.dtype))
    return y


@dataclass(frozen=True)
class MultiLoraProblem:
    """Operands and incoming gradients of ``multi_lora_shared``; one slice makes it one of ``multi_lora``.

    ``fused``, ``eager`` and ``exact`` return outputs and gradients by name: y0, dx, dlora_a0, dlora_b0, dy0, ...

    Attributes:
        x: the input ``[T, K]``.
        lora_as: ``[slots, R_p, K]`` of each slice.
        lora_bs: ``[slots, N_p, R_p]``.
        ys: what is added to, ``[T, N_p]``.
        dys: the incoming gradients ``[T, N_p]``.
        token_slots: int32 ``[T]``.
        scales: ``[slots]`` or ``[P, slots]``.
        ranks: int32, of the same shape, or None.
        dropouts: a probability for each slot, or None.
        seeds: int64 ``[slots]`` or ``[P, slots]``.
    """

    x: Tensor
    lora_as: tuple[Tensor, ...]
    lora_bs: tuple[Tensor, ...]
    ys: tuple[Tensor, ...]
    dys: tuple[Tensor, ...]
    token_slots: Tensor
    scales: Tensor
    ranks: Tensor | None
    dropouts: tuple[float, ...] | None
    seeds: Tensor

    @classmethod
    def make(
        cls,
        tokens: int = 41,
        k: int = 38,
        outs: tuple[int, ...] = (45,),
        ranks: tuple[int, ...] = (12,),
        slots: int = 4,
        dtype: torch.dtype = torch.float32,
        adapter_dtype: torch.dtype | None = None,
        device="cpu",
        dropout: float = 0.0,
        integers: bool = False,
        seed: int = 0,
    ) -> "MultiLoraProblem":
        """Random operands. Every slot, the last one and none (-1) included, has tokens if there are enough.

        True ranks differ, and what lies beyond them is NaN; scales differ, and some are negative.

        Args:
            tokens: T.
            k: K.
            outs: N of each slice.
            ranks: R of each slice.
            slots: how many.
            dtype: of the operands.
            adapter_dtype: of A and B; None: the operands'.
            device: where the tensors lie.
            dropout: probability of every second slot, in [0, 1).
            integers: draw -1, 0 and 1 alone, on which all arithmetic is exact; see ``integer_inputs``.
            seed: of the draws. The same arguments give the same problem.
        """
        adapter, count = adapter_dtype or dtype, len(outs)
        generator = torch.Generator().manual_seed(seed)

        def number(most):
            return int(torch.randint(most, (), generator=generator))

        def draw(*size, spread=1.0, to=dtype):
            if integers:
                return integer_inputs(size, dtype=to, device=device, seed=number(1 << 30))[0]
            return (torch.randn(size, generator=generator, dtype=torch.float64) * spread).to(device, to)

        true = torch.tensor([[max(1, r - 3 * ((p + s) % 4)) for s in range(slots)] for p, r in enumerate(ranks)])
        lora_as = tuple(draw(slots, r, k, spread=k**-0.5, to=adapter) for r in ranks)
        lora_bs = tuple(draw(slots, n, r, spread=r**-0.5, to=adapter) for n, r in zip(outs, ranks, strict=True))
        for p, s in torch.cartesian_prod(torch.arange(count), torch.arange(slots)).tolist():
            lora_as[p][s, true[p, s] :] = torch.nan
            lora_bs[p][s, :, true[p, s] :] = torch.nan
        token_slots = torch.arange(tokens) % (slots + 1) - 1
        token_slots = token_slots[torch.randperm(tokens, generator=generator)]
        scales = torch.tensor([[(0.5, -1.0, 2.0)[(p + s) % 3] for s in range(slots)] for p in range(count)])
        tables = scales.to(torch.promote_types(adapter, torch.float32)), true.int()
        scales, true = (table[0] if count == 1 else table for table in tables)
        seeds = torch.arange(count * slots).view(count, slots) + 1234567 + seed
        return cls(
            x=draw(tokens, k),
            lora_as=lora_as,
            lora_bs=lora_bs,
            ys=tuple(draw(tokens, n) for n in outs),
            dys=tuple(draw(tokens, n) for n in outs),
            token_slots=token_slots.to(device, torch.int32),
            scales=scales.to(device),
            ranks=true.to(device),
            dropouts=tuple(dropout * (s % 2) for s in range(slots)) if dropout else None,  # not everyone drops
            seeds=(seeds[0] if count == 1 else seeds).to(device),
        )

    def fused(self, backend: str | None = None, tile: int | None = None) -> dict[str, Tensor]:
        """Outputs and gradients of fastpeft's op.

        Args:
            backend: which serves the op; None for the automatic choice.
            tile: of the routing, 16 or 64; None for what ``route`` takes.
        """

        def call(x, *lists):
            routing = ops.route(self.token_slots, self.lora_as[0].shape[0], tile, backend)
            options: dict[str, Any] = {"dropouts": self.dropouts}
            options["seeds"] = None if self.dropouts is None else self.seeds
            if len(self.ys) > 1:
                lora_as, lora_bs, ys = lists
                return ops.multi_lora_shared(
                    x, lora_as, lora_bs, routing, self.scales, self.ranks, ys, backend, **options
                )
            lora_a, lora_b, y = (values[0] for values in lists)
            return [ops.multi_lora(x, lora_a, lora_b, routing, self.scales, self.ranks, y, backend, **options)]

        return self.differentiate(call)

    def eager(self, function: Callable = eager_multi_lora) -> dict[str, Tensor]:
        """Outputs and gradients of the yardstick.

        Args:
            function: what is called in place of ``eager_multi_lora``, with its arguments.
        """

        def call(x, lora_as, lora_bs, ys):
            outs = []
            for p, (a, b, y) in enumerate(zip(lora_as, lora_bs, ys, strict=True)):
                scales, ranks, seeds = (
                    t[p] if t is not None and t.dim() == 2 else t for t in (self.scales, self.ranks, self.seeds)
                )
                outs.append(function(x, a, b, self.token_slots, scales, ranks, y, self.dropouts, seeds))
            return outs

        return self.differentiate(call)

    def exact(self) -> dict[str, Tensor]:
        return self.map(lambda t: t.detach().double()).eager(reference.multi_lora)

    def map(self, function: Callable[[Tensor], Tensor]) -> "MultiLoraProblem":
        """The same problem with ``function`` applied to every operand and incoming gradient.

        Args:
            function: takes a tensor and returns one, of another dtype or device, say.
        """
        lora_as, lora_bs, ys, dys = (tuple(map(function, ts)) for ts in (self.lora_as, self.lora_bs, self.ys, self.dys))
        return replace(self, x=function(self.x), lora_as=lora_as, lora_bs=lora_bs, ys=ys, dys=dys)

    def differentiate(self, call: Callable) -> dict[str, Tensor]:
        """Run ``call`` and backward from ``dys``.

        Args:
            call: takes x and the lists of A's, B's and y's, and returns a y for each slice.
        """
        x = self.x.detach().requires_grad_()
        lists = [[t.detach().requires_grad_() for t in group] for group in (self.lora_as, self.lora_bs, self.ys)]
        outs = call(x, *lists)
        leaves = [x, *(t for group in lists for t in group)]
        count = len(self.ys)
        names = ["dx", *(f"d{name}{p}" for name in ("lora_a", "lora_b", "y") for p in range(count))]
        grads = torch.autograd.grad(outs, leaves, self.dys, materialize_grads=True)
        return {f"y{p}": y.detach() for p, y in enumerate(outs)} | dict(zip(names, grads, strict=True))


def ratios(problem: MultiLoraProblem, backend: str | None = None, tile: int | None = None) -> dict[str, Ratios]:
    """``error_vs_eager`` of every output and gradient of the problem."""
    fused, eager, exact = problem.fused(backend, tile), problem.eager(), problem.exact()
    return {name: error_vs_eager(fused[name], eager[name], exact[name]) for name in exact}


def check(device: torch.device | str) -> Iterator[tuple[str, torch.dtype, Ratios]]:
    """Every dtype, both forms and both tiles, on each backend that serves ``device``; the worst ratios of each."""
    forms = {"multi_lora": ((320,), (16,)), "multi_lora_shared": ((320, 96, 96), (16, 8, 24))}
    for name, (outs, ranks) in forms.items():
        for dtype, adapter in TRAINING:
            for backend in _backend.ORDER:
                dropout = 0.1 if backend != "cuda" else 0.0  # csrc/ serves
                problem = MultiLoraProblem.make(201, 448, outs, ranks, 6, dtype, adapter, device, dropout=dropout)
                if REASONS[backend](problem.x, problem.lora_as) is None:
                    found = worst(ratio for tile in TILES for ratio in ratios(problem, backend, tile).values())
                    note = "" if dtype == adapter else ", fp32 adapters"
                    yield f"{name} {backend}{note}", dtype, found
