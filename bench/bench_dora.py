"""DoRA around a linear layer: the frozen layer, PEFT's, PEFT's under torch.compile, ours; time, kept and peak bytes.

    python -m bench.bench_dora --device cpu --out rows.jsonl [--quick] [--shape 1024x1024] [--rows 512]

Adapters and magnitudes are float32, as PEFT has them; x and they want gradients.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastpeft import _check
from fastpeft.integrations.peft import accelerate
from fastpeft.reference import inverse_keep, keep_mask

from . import command, harness, machine, peers
from .harness import FROZEN, PEER, SEED, Call, Variant
from .lora import SCALE
from .lora import Problem as Linear

OURS, COMPILED = "ours", "PEFT, torch.compile"
SHAPES = {"cpu": ("1024x1024",), "cuda": ("4096x4096", "4096x14336")}


@dataclass(frozen=True)
class Problem(Linear):
    """As of ``lora_linear``; with dropout the base has a second product each way."""

    @property
    def op(self) -> str:
        return "dora_linear"


@dataclass(frozen=True)
class Operands:
    """What every variant is given."""

    x: Tensor
    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    magnitude: Tensor
    dy: Tensor

    @classmethod
    def draw(cls, problem: Problem, seed: int) -> "Operands":
        generator, wide = torch.Generator().manual_seed(seed), torch.promote_types(problem.dtype, torch.float32)
        (k, (n,)), m, r = problem.sizes, problem.rows, problem.rank

        def new(*size, spread=1.0, dtype=problem.dtype):
            return (torch.randn(size, generator=generator) * spread).to(problem.device, dtype)

        weight = new(n, k, spread=k**-0.5)
        gain = 1 + 0.1 * torch.randn(n, generator=generator).to(problem.device)
        return cls(
            new(m, k),
            weight,
            new(r, k, spread=k**-0.5, dtype=wide),
            # B A is then half the size of W: an adapter late in training, not its first step.
            new(n, r, spread=0.25 * r**-0.5, dtype=wide),
            weight.to(wide).norm(dim=1) * gain,
            new(m, n),
        )


def plain(x, weight, lora_a, lora_b, magnitude, factors: Tensor | None) -> Tensor:
    """DoRA as a person writes it; ``factors`` are what dropout multiplies x by, and products with W in W's dtype."""
    wide = x.to(lora_a.dtype)
    gain = magnitude / torch.linalg.vector_norm(weight.to(wide.dtype) + SCALE * (lora_b @ lora_a).detach(), dim=1)
    dropped = wide if factors is None else wide * factors.to(wide.dtype)
    own = (gain - 1) * F.linear(dropped.to(weight.dtype), weight)
    y = F.linear(x, weight) + own + gain * SCALE * F.linear(F.linear(dropped, lora_a), lora_b)
    return y.to(x.dtype)


def factors_of(name: str, problem: Problem, x: Tensor) -> Tensor | None:
    """What the variant's dropout multiplies x by after ``torch.manual_seed``."""
    if not problem.dropout:
        return None
    torch.manual_seed(SEED)
    if name == OURS:
        seed = _check.seed("bench_dora", "seed", None, x.device)
        return keep_mask(seed, problem.dropout, *x.shape, torch.float64) * inverse_keep(problem.dropout)
    return F.dropout(torch.ones_like(x, dtype=torch.promote_types(x.dtype, torch.float32)), problem.dropout).double()


def layer_of(problem: Problem, o: Operands) -> nn.Module:
    """PEFT's layer with these operands."""
    import peft

    n, k = o.weight.shape
    base = nn.Linear(k, n, False, device="meta")
    base.weight = nn.Parameter(o.weight, requires_grad=False)
    settings = {"r": problem.rank, "lora_alpha": SCALE * problem.rank, "lora_dropout": problem.dropout}
    config = peft.LoraConfig(**settings, use_dora=True, target_modules=["proj"])
    layer = peft.inject_adapter_in_model(config, nn.ModuleDict({"proj": base}))["proj"].train()
    layer.lora_A["default"].weight, layer.lora_B["default"].weight = nn.Parameter(o.lora_a), nn.Parameter(o.lora_b)
    layer.lora_magnitude_vector["default"].weight = nn.Parameter(o.magnitude)
    return layer


CHANGES: dict[str, Callable] = {PEER: lambda layer: layer, COMPILED: peers.compiled(), OURS: accelerate}


def variant(problem: Problem, name: str) -> Variant:
    draw = cache(partial(Operands.draw, problem))
    trained = [] if name == FROZEN else ["lora_a", "lora_b", "magnitude"]

    def bind(i):
        o = draw(i)
        x = o.x.detach().requires_grad_()
        if name == FROZEN:
            return Call(lambda: [F.linear(x, o.weight)], [x], [o.dy], [o.weight])
        layer = layer_of(problem, o)
        adapter = [parts["default"].weight for parts in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector)]
        run = CHANGES[name](layer)
        return Call(lambda: [run(x)], [x, *adapter], [o.dy], [o.weight, *adapter])

    def definition(dtype):
        o = draw(0)
        x, *leaves = [
            t.detach().to(dtype or t.dtype).requires_grad_() for t in (o.x, *(getattr(o, n) for n in trained))
        ]
        weight, dy = (t.to(dtype or t.dtype) for t in (o.weight, o.dy))
        y = plain(x, weight, *leaves, factors_of(name, problem, o.x)) if trained else F.linear(x, weight)
        return [y, *torch.autograd.grad(y, [x, *leaves], dy)]

    adapter = None if name == FROZEN else torch.promote_types(problem.dtype, torch.float32)
    fields = {"adapter_dtype": None if adapter is None else str(adapter).removeprefix("torch.")}
    return Variant(name, bind, definition, partial(traffic, problem, adapter), fields, own=name == OURS)


def traffic(problem: Problem, adapter: torch.dtype | None, which: str) -> tuple[int, int]:
    """The least bytes and operations: as of LoRA, and with dropout the second products."""
    moved, operations = problem.traffic(which, adapter)
    k, (n,) = problem.sizes
    again = (1 if which == harness.FORWARD else 2) if adapter is not None and problem.dropout else 0
    return moved, operations + again * 2 * problem.rows * k * n


def case(problem: Problem, compiles: bool) -> harness.Case:
    k, (n,) = problem.sizes
    sets = machine.argument_sets(problem.device, problem.dtype.itemsize * (problem.rows * (k + n) + k * n))
    names = [FROZEN, PEER, OURS, *([COMPILED] if compiles else [])]
    return harness.Case.of(problem, [variant(problem, name) for name in names], sets)


def cases(options: argparse.Namespace) -> list[Callable[[], harness.Case]]:
    cuda = options.device.type == "cuda"
    dtypes = (torch.bfloat16,) if cuda else (torch.float32, torch.bfloat16)
    rows, shapes = 8192 if cuda else 512, options.shape or SHAPES[options.device.type]
    listed = [Problem(s, rows, dtype, 16, p, options.device) for s in shapes for dtype in dtypes for p in (0.0, 0.05)]
    listed = [replace(p, **command.given(options, "rows", "rank")) for p in listed]
    return [partial(case, p, command.compiles(options, False)) for p in listed[: 1 if options.quick else None]]


def main(argv: list[str] | None = None) -> int:
    parser = command.parser("bench_dora", __doc__, quick="the first case", variants=[FROZEN, PEER, OURS, COMPILED])
    parser.add_argument("--shape", action="append", help="KxN; may be repeated")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--rank", type=int)
    command.add_compile(parser, "PEFT")
    return command.main(parser, cases, argv)


if __name__ == "__main__":
    sys.exit(main())
