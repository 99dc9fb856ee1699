"""Problems for bottleneck, solved three ways: fused, eager, exact."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _backend, ops, reference
from ..ops.bottleneck import REASONS
from ..ops.routing import TILES
from .accuracy import TRAINING, Ratios, error_vs_eager, integer_inputs, worst

WEIGHTS = ("down_weight", "down_bias", "up_weight", "up_bias", "scale", "norm_weight", "norm_bias")
_ACTIVATIONS: dict[str, Callable] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "leaky_relu": F.leaky_relu,
    "identity": lambda z: z,
}


def eager_bottleneck(
    x, down_weight, down_bias, up_weight, up_bias, residual=None, activation="relu", scale=1.0,
    norm_weight=None, norm_bias=None, norm="layer", eps=1e-5, dropout=0.0, seed=0, slots=None,
) -> Tensor:  # fmt: skip
    """What a person writes, and what ``adapters`` does: the yardstick. Arguments as in ``fastpeft.ops.bottleneck``.

    Args:
        x: the input ``[..., K]``.
        down_weight: D ``[H, K]``.
        down_bias: d ``[H]``, or None.
        up_weight: U ``[N, H]``.
        up_bias: b ``[N]``, or None.
        residual: ``[..., N]``, or None for none.
        activation: "relu", "gelu", "gelu_tanh", "silu", "tanh", "leaky_relu" or "identity".
        scale: a number, or a tensor ``[1]`` or ``[N]``.
        norm_weight: ``[K]``, or None for no norm.
        norm_bias: ``[K]``, or None.
        norm: "layer" or "rms".
        eps: added to the variance or the mean square.
        dropout: probability of dropping an element, in [0, 1).
        seed: of the mask: an integer, or an int64 tensor of one element or one for each slot.
        slots: the rows' adapters, -1 for none; every weight then has a leading dimension.
    """
    if slots is not None:
        y = x.new_zeros(*x.shape[:-1], up_weight.shape[1]) if residual is None else residual
        weights = down_weight, down_bias, up_weight, up_bias, scale, norm_weight, norm_bias
        for slot in range(len(down_weight)):
            rows = slots == slot
            down, down_b, up, up_b, s, norm_w, norm_b = (t[slot] if isinstance(t, Tensor) else t for t in weights)
            settings = activation, s, norm_w, norm_b, norm, eps, dropout, _seed_of(seed, slot)
            part = eager_bottleneck(x[rows], down, down_b, up, up_b, y[rows], *settings)
            y = torch.index_put(y, (rows,), part)
        return y
    a = x.to(down_weight.dtype)
    if norm_weight is not None:
        shape = a.shape[-1:]
        if norm == "layer":
            a = F.layer_norm(a, shape, norm_weight, norm_bias, eps)
        else:
            a = F.rms_norm(a, shape, norm_weight, eps)
            a = a if norm_bias is None else a + norm_bias
    h = _ACTIVATIONS[activation](F.linear(a, down_weight, down_bias))
    u = F.linear(h, up_weight, up_bias) * scale
    if dropout:
        seed = torch.as_tensor(seed, dtype=torch.int64, device=x.device)
        mask = reference.keep_mask(seed, dropout, u[..., 0].numel(), u.shape[-1], u.dtype)
        u = u * (mask.view(u.shape) * reference.inverse_keep(dropout))
    return u.to(x.dtype) if residual is None else (residual + u).to(residual.dtype)


def _seed_of(seed, slot):
    return seed[slot] if isinstance(seed, Tensor) and seed.numel() > 1 else seed


@dataclass(frozen=True)
class BottleneckProblem:
    """Operands and the incoming gradient of ``bottleneck``.

    ``fused``, ``eager`` and ``exact`` return the output and the gradients by name: y, dx, dresidual, ddown_weight, ...

    Attributes:
        x: the input ``[..., K]``.
        weights: by name, see ``WEIGHTS``; what is absent is not in it.
        residual: a tensor ``[..., N]``, "x" for x itself, or None.
        dy: the incoming gradient ``[..., N]``.
        slots: the rows' adapters, or None for one adapter.
        settings: activation, norm, dropout, a number for scale, and seed.
    """

    x: Tensor
    weights: dict[str, Tensor]
    residual: Tensor | str | None
    dy: Tensor
    slots: Tensor | None
    settings: dict

    @classmethod
    def make(
        cls,
        shape: tuple[int, ...] = (37, 40),
        hidden: int = 12,
        out: int | None = None,
        dtype: torch.dtype = torch.float32,
        weights_dtype: torch.dtype | None = None,
        device="cpu",
        residual: str | None = "other",
        activation: str = "relu",
        scale: float | str = 0.5,
        norm: str | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        slots: int | None = None,
        integers: bool = False,
        seed: int = 0,
    ) -> "BottleneckProblem":
        """Random operands; the branch is of about the residual's size.

        Args:
            shape: x's, of which the last is K.
            hidden: H, the width of the bottleneck.
            out: N; None: K.
            dtype: of the operands.
            weights_dtype: of the weights; None: the operands'.
            device: where the tensors lie.
            residual: "x", "other" or None.
            activation: as in ``fastpeft.ops.bottleneck``.
            scale: a number, "learned" or "channel".
            norm: "layer", "rms", or None for none.
            bias: whether projections and norm have biases.
            dropout: probability of dropping an element, in [0, 1).
            slots: so many adapters, whose rows, and rows of none, are mixed; None: one adapter.
            integers: draw -1, 0 and 1 alone, on which all arithmetic is exact; see ``integer_inputs``.
            seed: of the draws. The same arguments give the same problem.
        """
        wide, k = weights_dtype or dtype, shape[-1]
        n, generator = out or k, torch.Generator().manual_seed(seed)

        def number():
            return int(torch.randint(1 << 30, (), generator=generator))

        def draw(*size, spread=1.0, to=wide, around=0.0):
            if integers:
                return integer_inputs(size, dtype=to, device=device, seed=number())[0]
            return (torch.randn(size, generator=generator, dtype=torch.float64) * spread + around).to(device, to)

        lead = () if slots is None else (slots,)
        weights = {
            "down_weight": draw(*lead, hidden, k, spread=k**-0.5),
            "up_weight": draw(*lead, n, hidden, spread=hidden**-0.5),
        }
        if bias:
            weights |= {"down_bias": draw(*lead, hidden), "up_bias": draw(*lead, n)}
        if isinstance(scale, str):
            weights["scale"] = draw(*lead, n if scale == "channel" else 1, spread=0.5, around=1.0)
        if norm is not None:
            weights["norm_weight"] = draw(*lead, k, spread=0.5, around=1.0)
        if norm is not None and bias:
            weights["norm_bias"] = draw(*lead, k)
        rows = torch.Size(shape[:-1]).numel()
        token_slots, seeds = None, torch.tensor(1234567 + seed)
        if slots is not None:
            token_slots = torch.arange(rows) % (slots + 1) - 1
            token_slots = token_slots[torch.randperm(rows, generator=generator)].view(shape[:-1]).int().to(device)
            seeds = torch.arange(slots) + seeds
        settings = {"activation": activation, "norm": norm or "layer", "dropout": dropout, "seed": seeds.to(device)}
        if not isinstance(scale, str):
            settings["scale"] = scale
        other = draw(*shape[:-1], n, to=dtype)
        return cls(
            x=draw(*shape, to=dtype),
            weights=weights,
            residual=other if residual == "other" else residual,
            dy=draw(*shape[:-1], n, to=dtype),
            slots=token_slots,
            settings=settings,
        )

    def fused(self, backend: str | None = None, tile: int | None = None) -> dict[str, Tensor]:
        """Outputs and gradients of fastpeft's op.

        Args:
            backend: which serves the op; None for the automatic choice.
            tile: of the routing, 16 or 64; None for what ``route`` takes.
        """

        def call(slots, **operands):
            if slots is not None:
                slots = ops.route(slots, len(self.weights["down_weight"]), tile, backend)
            return ops.bottleneck(slots=slots, backend=backend, **operands)

        return self.differentiate(call)

    def eager(self, function: Callable = eager_bottleneck) -> dict[str, Tensor]:
        """Outputs and gradients of the yardstick.

        Args:
            function: what is called in place of ``eager_bottleneck``, with its arguments.
        """
        return self.differentiate(function)

    def exact(self) -> dict[str, Tensor]:
        def definition(**operands):
            seed = torch.as_tensor(operands.pop("seed"), device=self.x.device)
            return reference.bottleneck(seed=seed, **operands)

        return self.map(lambda t: t.detach().double()).eager(definition)

    def map(self, function: Callable[[Tensor], Tensor]) -> "BottleneckProblem":
        """The same problem with ``function`` applied to every operand and the incoming gradient.

        Args:
            function: takes a tensor and returns one, of another dtype or device, say.
        """
        residual = function(self.residual) if isinstance(self.residual, Tensor) else self.residual
        weights = {name: function(t) for name, t in self.weights.items()}
        return replace(self, x=function(self.x), dy=function(self.dy), residual=residual, weights=weights)

    def differentiate(self, call: Callable) -> dict[str, Tensor]:
        """Run ``call`` on the operands by name, and backward from ``dy``.

        Args:
            call: takes slots, the operands and the settings by name, and returns y.
        """
        leaves = {"x": self.x.detach().requires_grad_()}
        if isinstance(self.residual, Tensor):
            leaves["residual"] = self.residual.detach().requires_grad_()
        leaves |= {name: t.detach().requires_grad_() for name, t in self.weights.items()}
        operands = {"down_bias": None, "up_bias": None} | leaves
        if isinstance(self.residual, str):
            operands["residual"] = leaves["x"]
        y = call(slots=self.slots, **operands, **self.settings)
        grads = torch.autograd.grad(y, list(leaves.values()), self.dy, materialize_grads=True)
        return {"y": y.detach()} | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def ratios(problem: BottleneckProblem, backend: str | None = None, tile: int | None = None) -> dict[str, Ratios]:
    """``error_vs_eager`` of the output and every gradient of the problem."""
    fused, eager, exact = problem.fused(backend, tile), problem.eager(), problem.exact()
    return {name: error_vs_eager(fused[name], eager[name], exact[name]) for name in exact}


def check(device: torch.device | str) -> Iterator[tuple[str, torch.dtype, Ratios]]:
    """Every dtype that training uses, one adapter and several, on each backend that serves ``device``; worst ratios.

    Activations are smooth: where z rounds to the other side of relu's kink, one row's error says nothing.
    """
    forms: dict[str, dict[str, Any]] = {
        "bottleneck": {"residual": "x", "norm": "layer", "activation": "gelu"},
        "bottleneck slots": {"slots": 3, "activation": "silu"},
    }
    for name, form in forms.items():
        for dtype, wide in TRAINING:
            problem = BottleneckProblem.make((201, 448), 112, 448, dtype, wide, device, dropout=0.1, **form)
            for backend in _backend.ORDER:
                if REASONS[backend](problem.x, problem.weights["down_weight"]) is None:
                    tiles = (None,) if problem.slots is None else TILES
                    found = worst(ratio for tile in tiles for ratio in ratios(problem, backend, tile).values())
                    yield f"{name} {backend}" + ", fp32 weights" * (dtype != wide), dtype, found
