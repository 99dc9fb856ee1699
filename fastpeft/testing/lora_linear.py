"""Problems for lora_linear and lora_linear_shared, solved three ways: fused, eager, exact."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _backend, ops, reference
from ..ops.lora_linear import REASONS
from .accuracy import TRAINING, Ratios, error_vs_eager, integer_inputs, worst


def eager_lora_linear(x, weight, lora_a, lora_b, bias=None, scale=1.0, dropout=0.0, seed=0) -> Tensor:
    """What a person writes, and what PEFT does: the yardstick.

    Args:
        x: the input ``[..., K]``.
        weight: ``[N, K]``, or None for the low-rank term alone.
        lora_a: ``[r, K]``.
        lora_b: ``[N, r]``.
        bias: ``[N]``, or None.
        scale: factor of the low-rank term.
        dropout: probability of dropping an element, in [0, 1).
        seed: of the mask, an integer or an int64 tensor of one element.
    """
    branch = x.to(lora_a.dtype)
    if dropout:
        seed = torch.as_tensor(seed, dtype=torch.int64, device=x.device)
        mask = reference.keep_mask(seed, dropout, x[..., 0].numel(), x.shape[-1], branch.dtype)
        branch = branch * (mask.view(x.shape) * reference.inverse_keep(dropout))
    delta = F.linear(F.linear(branch, lora_a), lora_b) * scale
    if weight is None:
        return (delta if bias is None else delta + bias).to(x.dtype)
    return (F.linear(x, weight, bias) + delta).to(x.dtype)


@dataclass(frozen=True)
class LoraProblem:
    """Operands and incoming gradients of ``lora_linear_shared``; one projection makes it one of ``lora_linear``.

    ``fused``, ``eager`` and ``exact`` return the outputs and the gradients by name: y0, dx, dweight0, dlora_a0, ...

    Attributes:
        x: the input ``[..., K]``.
        weights: ``[N_p, K]`` of each projection, or None.
        lora_as: ``[r_p, K]``.
        lora_bs: ``[N_p, r_p]``.
        biases: ``[N_p]``, or None.
        dys: the incoming gradients ``[..., N_p]``.
        scales: factors of the low-rank terms.
        dropouts: probabilities in [0, 1).
        seeds: of the masks.
    """

    x: Tensor
    weights: tuple[Tensor | None, ...]
    lora_as: tuple[Tensor, ...]
    lora_bs: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    dys: tuple[Tensor, ...]
    scales: tuple[float, ...]
    dropouts: tuple[float, ...]
    seeds: tuple[int, ...]

    @classmethod
    def make(
        cls,
        shape: tuple[int, ...],
        outs: tuple[int, ...] = (24,),
        ranks: tuple[int, ...] = (8,),
        dtype: torch.dtype = torch.float32,
        adapter_dtype: torch.dtype | None = None,
        device="cpu",
        dropout: float = 0.0,
        integers: bool = False,
        seed: int = 0,
    ) -> "LoraProblem":
        """Random operands for x of ``shape``; the low-rank term is of about the base term's size, or smaller.

        Args:
            shape: x's, of which the last is K.
            outs: N of each projection.
            ranks: of each projection.
            dtype: of the operands.
            adapter_dtype: of A and B; None: the operands'.
            device: where the tensors lie.
            dropout: probability of dropping an element, in [0, 1).
            integers: draw -1, 0 and 1 alone, on which all arithmetic is exact; see ``integer_inputs``.
            seed: of the draws. The same arguments give the same problem.
        """
        adapter, k = adapter_dtype or dtype, shape[-1]
        generator = torch.Generator().manual_seed(seed)

        def draw(*size, spread=1.0, to=dtype):
            if integers:
                (value,) = integer_inputs(
                    size, dtype=to, device=device, seed=int(torch.randint(1 << 30, (), generator=generator))
                )
                return value
            return (torch.randn(size, generator=generator, dtype=torch.float64) * spread).to(device, to)

        pairs = list(zip(outs, ranks, strict=True))
        return cls(
            x=draw(*shape),
            weights=tuple(draw(n, k, spread=k**-0.5) for n in outs),
            lora_as=tuple(draw(r, k, spread=k**-0.5, to=adapter) for r in ranks),
            lora_bs=tuple(draw(n, r, spread=r**-0.5, to=adapter) for n, r in pairs),
            biases=tuple(draw(n) for n in outs),
            dys=tuple(draw(*shape[:-1], n) for n in outs),
            scales=tuple((0.5, 1.0, 0.25)[p % 3] for p in range(len(outs))),
            dropouts=(dropout,) * len(outs),
            seeds=tuple(1234567 + seed + p for p in range(len(outs))),
        )

    def fused(self, backend: str | None = None) -> dict[str, Tensor]:
        """Outputs and gradients of fastpeft's op.

        Args:
            backend: which serves the op; None for the automatic choice.
        """

        scales, dropouts, seeds = self.scales, self.dropouts, self.seeds

        def call(x, weights, lora_as, lora_bs, biases):
            if len(weights) > 1:
                lists = weights, lora_as, lora_bs, biases
                return ops.lora_linear_shared(x, *lists, scales, dropouts, seeds, backend)
            one = weights[0], lora_as[0], lora_bs[0], biases[0]
            return [ops.lora_linear(x, *one, scales[0], dropouts[0], seeds[0], backend)]

        return self.differentiate(call)

    def eager(self, function: Callable = eager_lora_linear) -> dict[str, Tensor]:
        """Outputs and gradients of the yardstick.

        Args:
            function: what is called in place of ``eager_lora_linear``, with its arguments.
        """

        def call(x, *lists):
            rows = zip(*lists, self.scales, self.dropouts, self.seeds, strict=True)
            return [function(x, *row) for row in rows]

        return self.differentiate(call)

    def exact(self) -> dict[str, Tensor]:
        def definition(x, weight, lora_a, lora_b, bias, scale, dropout, seed):
            seed = torch.tensor(seed, device=x.device)
            return reference.lora_linear(x, weight, lora_a, lora_b, bias, scale, dropout, seed)

        return self.map(lambda t: t.detach().double()).eager(definition)

    def map(self, function: Callable[[Tensor], Tensor]) -> "LoraProblem":
        """The same problem with ``function`` applied to every tensor.

        Args:
            function: takes a tensor and returns one, of another dtype or device, say.
        """
        groups = {name: getattr(self, name) for name in ("weights", "lora_as", "lora_bs", "biases", "dys")}
        groups = {name: tuple(None if t is None else function(t) for t in group) for name, group in groups.items()}
        return replace(self, x=function(self.x), **groups)

    def differentiate(self, call: Callable) -> dict[str, Tensor]:
        """Run ``call`` and backward from ``dys``.

        Args:
            call: takes x and the lists of weights, A's, B's and biases, and returns a y for each projection.
        """
        names, leaves = ["dx"], [self.x.detach().requires_grad_()]
        lists = []
        for name, group in zip(
            ("weight", "lora_a", "lora_b", "bias"), (self.weights, self.lora_as, self.lora_bs, self.biases), strict=True
        ):
            lists.append([None if t is None else t.detach().requires_grad_() for t in group])
            names += [f"d{name}{p}" for p, t in enumerate(lists[-1]) if t is not None]
            leaves += [t for t in lists[-1] if t is not None]
        ys = call(leaves[0], *lists)
        grads = torch.autograd.grad(ys, leaves, self.dys)
        return {f"y{p}": y.detach() for p, y in enumerate(ys)} | dict(zip(names, grads, strict=True))


def ratios(problem: LoraProblem, backend: str | None = None) -> dict[str, Ratios]:
    """``error_vs_eager`` of every output and gradient of the problem."""
    fused, eager, exact = problem.fused(backend), problem.eager(), problem.exact()
    return {name: error_vs_eager(fused[name], eager[name], exact[name]) for name in exact}


def check(device: torch.device | str) -> Iterator[tuple[str, torch.dtype, Ratios]]:
    """Every dtype that training uses, both forms, on each backend that serves ``device``; the worst ratios of each."""
    forms = {"lora_linear": ((320,), (16,)), "lora_linear_shared": ((320, 96, 96), (16, 8, 24))}
    for name, (outs, ranks) in forms.items():
        for dtype, adapter in TRAINING:
            problem = LoraProblem.make((4, 67, 448), outs, ranks, dtype, adapter, device, dropout=0.1)
            for backend in _backend.ORDER:
                if REASONS[backend](problem.x, problem.lora_as, problem.weights, problem.lora_bs) is None:
                    found = worst(ratios(problem, backend).values())
                    note = "" if dtype == adapter else ", fp32 adapters"
                    yield f"{name} {backend}{note}", dtype, found
