"""Problems for experts, solved three ways: fused, eager, exact."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _backend, ops, reference
from ..ops.experts_arguments import REASONS
from ..ops.routing import TILES
from ..reference import ExpertLinear
from .accuracy import TRAINING, Ratios, error_vs_eager, integer_inputs, worst


def swiglu(u: Tensor) -> Tensor:
    """The gate of most models: ``silu(left) · right``.

    Args:
        u: ``[n, 2 K]``.
    """
    left, right = u.chunk(2, -1)
    return F.silu(left) * right


def exact_gate(u: Tensor) -> Tensor:
    """A gate that is exact on integers."""
    left, right = u.chunk(2, -1)
    return left.clamp(-1, 1) * right


def eager_experts(x, top_k_index, top_k_weights, up, down, activation, seeds=None) -> Tensor:
    """What transformers' experts do with LoRA beside their weights: one expert after another. The yardstick.

    Args:
        x: ``[T, H]``.
        top_k_index: integers ``[T, k]``.
        top_k_weights: ``[T, k]``.
        up: the first projection.
        down: the second one.
        activation: between them.
        seeds: int64 ``[2, E]`` of the dropout masks, or None.
    """
    y = torch.zeros_like(x)
    for e in range(len(up.weight)):
        token, choice = (top_k_index == e).nonzero().unbind(1)
        h = activation(_linear(x[token], up, e, None if seeds is None else seeds[0, e]))
        out = _linear(h, down, e, None if seeds is None else seeds[1, e]) * top_k_weights[token, choice, None]
        y = y.index_add(0, token, out.to(y.dtype))
    return y


def _linear(x, linear, e, seed):
    y = F.linear(x, linear.weight[e], None if linear.bias is None else linear.bias[e])
    if linear.lora_a is None:
        return y
    branch = x.to(linear.lora_a.dtype)
    if linear.dropout:
        mask = reference.keep_mask(seed, linear.dropout, len(branch), branch.shape[1], branch.dtype)
        branch = branch * (mask * reference.inverse_keep(linear.dropout))
    return y + (F.linear(F.linear(branch, linear.lora_a[e]), linear.lora_b[e]) * linear.scale).to(y.dtype)


@dataclass(frozen=True)
class ExpertsProblem:
    """Operands and the incoming gradient of ``experts``.

    ``fused``, ``eager`` and ``exact`` return the output and gradients by name: y, dx, dtop_k_weights, dup.lora_a, ...

    Attributes:
        x: ``[T, H]``.
        top_k_index: int64 ``[T, k]``.
        top_k_weights: ``[T, k]``.
        up: the first projection.
        down: the second one.
        dy: the incoming gradient ``[T, H]``.
        seeds: int64 ``[2, E]`` of the dropout masks, or None.
        activation: between up and down.
    """

    x: Tensor
    top_k_index: Tensor
    top_k_weights: Tensor
    up: ExpertLinear
    down: ExpertLinear
    dy: Tensor
    seeds: Tensor | None
    activation: Callable[[Tensor], Tensor] = swiglu

    @classmethod
    def make(
        cls,
        tokens: int = 41,
        hidden: int = 38,
        inner: int = 22,
        experts: int = 5,
        top_k: int = 3,
        ranks: tuple[int | None, int | None] = (12, 5),
        dtype: torch.dtype = torch.float32,
        adapter_dtype: torch.dtype | None = None,
        device="cpu",
        dropout: float = 0.0,
        bias: bool = True,
        integers: bool = False,
        index: Tensor | None = None,
        seed: int = 0,
    ) -> "ExpertsProblem":
        """Random operands.

        Of the experts the last but one has no token, and one choice in nine is no expert, unless ``index`` says which.

        Args:
            tokens: T.
            hidden: H.
            inner: K of down; up's N is twice that.
            experts: E.
            top_k: k.
            ranks: R of up and of down, None for no adapter.
            dtype: of all but the adapters.
            adapter_dtype: theirs, if it is another.
            device: of all tensors.
            dropout: of both adapters.
            bias: whether the projections have biases.
            integers: operands with which all arithmetic is exact.
            index: top_k_index, None draws it.
            seed: of what is drawn.
        """
        adapter = adapter_dtype or dtype
        generator = torch.Generator().manual_seed(seed)

        def draw(*size, spread=1.0, to=dtype):
            if integers:
                number = int(torch.randint(1 << 30, (), generator=generator))
                return integer_inputs(size, dtype=to, device=device, seed=number)[0]
            return (torch.randn(size, generator=generator, dtype=torch.float64) * spread).to(device, to)

        def linear(n, k, rank, scale):
            parts = draw(experts, n, k, spread=k**-0.5), draw(experts, n) if bias else None
            if rank is None:
                return ExpertLinear(*parts)
            a = draw(experts, rank, k, spread=k**-0.5, to=adapter)
            b = draw(experts, n, rank, spread=rank**-0.5, to=adapter)
            return ExpertLinear(*parts, a, b, scale, dropout)

        if index is None:
            index = torch.rand(tokens, experts, generator=generator).argsort(1)[:, :top_k]
            index = torch.where(index == experts - 2, experts, index)
            index[torch.rand(index.shape, generator=generator) < 1 / 9] = -1
        weights = torch.rand(index.shape, generator=generator, dtype=torch.float64)
        weights = (2.0 ** (weights * 3).floor().sub(2) if integers else weights).to(device, dtype)
        return cls(
            x=draw(len(index), hidden),
            top_k_index=index.to(device),
            top_k_weights=weights,
            up=linear(2 * inner, hidden, ranks[0], 0.5),
            down=linear(hidden, inner, ranks[1], -2.0),
            dy=draw(len(index), hidden),
            seeds=torch.arange(2 * experts, device=device).view(2, experts) + 1234567 + seed if dropout else None,
            activation=exact_gate if integers else swiglu,
        )

    def fused(self, backend: str | None = None, tile: int | None = None) -> dict[str, Tensor]:
        """By the op.

        Args:
            backend: as in ``ops.experts``.
            tile: as in ``ops.experts``.
        """
        activation, seeds = self.activation, self.seeds

        def call(x, index, weights, up, down):
            return ops.experts(x, index, weights, up, down, activation, seeds, backend, tile=tile)

        return self.differentiate(call)

    def eager(self, function: Callable = eager_experts) -> dict[str, Tensor]:
        """By plain PyTorch.

        Args:
            function: takes what ``eager_experts`` takes.
        """
        return self.differentiate(lambda *args: function(*args, self.activation, self.seeds))

    def exact(self) -> dict[str, Tensor]:
        return self.map(lambda t: t.detach().double()).eager(reference.experts)

    def map(self, function: Callable[[Tensor], Tensor]) -> "ExpertsProblem":
        """The same problem with ``function`` applied to every floating-point operand and the incoming gradient.

        Args:
            function: from a tensor to another.
        """
        x, top_k_weights, dy = map(function, (self.x, self.top_k_weights, self.dy))
        up, down = _map(function, self.up), _map(function, self.down)
        return replace(self, x=x, top_k_weights=top_k_weights, dy=dy, up=up, down=down)

    def leaves(self) -> dict[str, Tensor]:
        """What has a gradient, by name."""
        parts = {f"{p}.{name}": t for p in ("up", "down") for name, t in getattr(self, p)._asdict().items()}
        parts = {name: t for name, t in parts.items() if isinstance(t, Tensor)}
        return {"x": self.x, "top_k_weights": self.top_k_weights, **parts}

    def differentiate(self, call: Callable) -> dict[str, Tensor]:
        """Run a call and backward from ``dy``.

        Args:
            call: takes x, top_k_index, top_k_weights, up and down.
        """
        problem = self.map(lambda t: t.detach().requires_grad_())
        y = call(problem.x, self.top_k_index, problem.top_k_weights, problem.up, problem.down)
        leaves = problem.leaves()
        grads = torch.autograd.grad(y, list(leaves.values()), self.dy, materialize_grads=True)
        return {"y": y.detach()} | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def _map(function, linear: ExpertLinear) -> ExpertLinear:
    return ExpertLinear._make(function(part) if isinstance(part, Tensor) else part for part in linear)


def ratios(problem: ExpertsProblem, backend: str | None = None, tile: int | None = None) -> dict[str, Ratios]:
    """``error_vs_eager`` of the output and every gradient of the problem."""
    fused, eager, exact = problem.fused(backend, tile), problem.eager(), problem.exact()
    return {name: error_vs_eager(fused[name], eager[name], exact[name]) for name in exact}


def check(device: torch.device | str) -> Iterator[tuple[str, torch.dtype, Ratios]]:
    """Every dtype and both tiles, on each backend that serves ``device``; the worst ratios of each."""
    for dtype, adapter in TRAINING:
        for backend in _backend.ORDER:
            problem = ExpertsProblem.make(101, 128, 192, 6, 2, (16, 8), dtype, adapter, device, 0.1)
            if REASONS[backend](problem.x, problem.up, problem.down) is None:
                found = worst(ratio for tile in TILES for ratio in ratios(problem, backend, tile).values())
                yield f"experts {backend}{'' if dtype == adapter else ', fp32 adapters'}", dtype, found
