"""A gated MLP with LoRA on its three projections: frozen, PEFT, torch.compile of PEFT, our layers, and as one op.

    python -m bench.bench_mlp --device cpu --out rows.jsonl [--quick] [--shape 1024x2816] [--rows 512]

What is timed is the MLP of a Llama block, of hidden size K and inner size I; x and the adapters want gradients. One has
DoRA, and where bitsandbytes is installed, one is in NF4. Without a GPU, host time of a whole block is in bench_host.py,
and its peak memory in tests/nullgpu/test_mlp*.py.
"""

import argparse
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpeft.nn.quantised import base_of
from fastpeft.ops import dequantise, dora_linear, dora_mlp, lora_linear, lora_linear_shared, lora_mlp
from fastpeft.testing import eager_dora_mlp, eager_lora_mlp

from . import bench_quantised, command, harness, machine, peers
from .harness import FROZEN, PEER, Call, Variant
from .lora import SCALE

OURS, LAYERS, COMPILED = "ours", "ours, three layers", "PEFT, torch.compile"


@dataclass(frozen=True)
class Problem:
    """An MLP: ``shape`` is KxI."""

    shape: str
    rows: int
    rank: int
    dtype: torch.dtype
    device: torch.device
    nf4: bool = False
    dora: bool = False

    @property
    def fields(self) -> dict:
        adapters = str(torch.promote_types(self.dtype, torch.float32)).removeprefix("torch.")
        return harness.columns(
            "dora_mlp" if self.dora else "lora_mlp_nf4" if self.nf4 else "lora_mlp",
            self.shape,
            self.rows,
            self.dtype,
            rank=self.rank,
            adapters=adapters,
        )

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """N and K of gate, up and down."""
        k, inner = map(int, self.shape.split("x"))
        return [(inner, k), (inner, k), (k, inner)]

    def traffic(self, which: str, adapted: bool) -> tuple[int, int]:
        """The least bytes and operations: every weight and activation is read or written once a pass."""
        (inner, k), *_ = self.sizes
        low, passes = 3 * self.rank * (k + inner) if adapted else 0, 1 if which == harness.FORWARD else 2
        moved = passes * (3 * k * inner + low + self.rows * (2 * k + 2 * inner))
        return moved * self.dtype.itemsize, 2 * self.rows * (passes * 3 * k * inner + (1 if passes == 1 else 3) * low)


@dataclass(frozen=True)
class Operands:
    """What every variant is given."""

    x: Tensor
    weights: tuple[Tensor, ...]
    lora_as: tuple[Tensor, ...]
    lora_bs: tuple[Tensor, ...]
    dy: Tensor
    magnitudes: tuple[Tensor, ...] = ()  # of DoRA

    @classmethod
    def draw(cls, problem: Problem, seed: int) -> "Operands":
        generator, wide = torch.Generator().manual_seed(seed), torch.promote_types(problem.dtype, torch.float32)

        def new(*size, spread=1.0, dtype=problem.dtype, trained=True):
            drawn = torch.randn(size, generator=generator) * spread
            return drawn.to(problem.device, dtype).requires_grad_(trained)

        sizes, rank = problem.sizes, problem.rank
        x, weights = new(problem.rows, sizes[0][1]), [new(n, k, spread=k**-0.5, trained=False) for n, k in sizes]
        if problem.nf4:  # what is read in 4 bits: quantised again it gives the same codes
            weights = [dequantise(base_of(bench_quantised.layer_of(w)), w.dtype) for w in weights]
        return cls(
            x,
            tuple(weights),
            tuple(new(rank, k, spread=k**-0.5, dtype=wide) for _, k in sizes),
            tuple(new(n, rank, spread=rank**-0.5, dtype=wide) for n, _ in sizes),
            new(problem.rows, sizes[0][1], trained=False),
            tuple((1.1 * w.to(wide).norm(dim=1)).requires_grad_() for w in weights if problem.dora),
        )

    def to(self, dtype: torch.dtype) -> "Operands":
        def change(t):
            return t.detach().to(dtype).requires_grad_(t.requires_grad)

        return Operands(*(tuple(map(change, v)) if isinstance(v, tuple) else change(v) for v in vars(self).values()))


def _gated(gate: Callable, up: Callable, down: Callable) -> Callable[[Tensor], Tensor]:
    return lambda x: down(F.silu(gate(x)) * up(x))


def _frozen(o: Operands) -> Callable:
    return _gated(*(partial(F.linear, weight=weight) for weight in o.weights))


def _peft(o: Operands, wrap=lambda function: function) -> Callable:
    operands = zip(o.weights, o.lora_as, o.lora_bs, o.magnitudes or [None] * 3, strict=True)
    return wrap(_gated(*(peers.peft_layer(*each, SCALE, 0.0, magnitude) for *each, magnitude in operands)))


def _layers(o: Operands, weights=None) -> Callable:
    weights = weights or o.weights
    if o.magnitudes:
        operands = zip(weights, o.lora_as, o.lora_bs, o.magnitudes, strict=True)
        return _gated(*(partial(_dora, operands=each) for each in operands))

    def forward(x):
        gate, up = lora_linear_shared(x, weights[:2], o.lora_as[:2], o.lora_bs[:2], None, [SCALE] * 2)
        return lora_linear(F.silu(gate) * up, weights[2], o.lora_as[2], o.lora_bs[2], None, SCALE)

    return forward


def _dora(x: Tensor, operands: tuple) -> Tensor:
    return dora_linear(x, *operands, None, SCALE)


def _node(o: Operands, weights=None) -> Callable:
    if o.magnitudes:
        return lambda x: dora_mlp(x, o.weights, o.lora_as, o.lora_bs, o.magnitudes, None, [SCALE] * 3)
    return lambda x: lora_mlp(x, weights or o.weights, o.lora_as, o.lora_bs, None, [SCALE] * 3)


PROVIDERS = {FROZEN: _frozen, PEER: _peft, COMPILED: None, LAYERS: _layers, OURS: _node}


def _in_nf4(name: str, o: Operands, layers: list) -> Callable:
    """The same around bitsandbytes' layers."""
    if name == FROZEN:
        return _gated(*layers)
    if name == PEER:
        return _gated(*bench_quantised.adapted(layers, o.lora_as, o.lora_bs))
    return PROVIDERS[name](o, [base_of(layer) for layer in layers])


def _as_peft_in_4_bits(weight: Tensor, lora_a: Tensor, lora_b: Tensor, x: Tensor) -> Tensor:
    """Its layer around bitsandbytes' rounds the low-rank term before it is added, unlike the one around nn.Linear."""
    return F.linear(x, weight) + (F.linear(F.linear(x.to(lora_a.dtype), lora_a), lora_b) * SCALE).to(x.dtype)


def variant(problem: Problem, name: str) -> Variant:
    adapted = name != FROZEN
    draw = cache(partial(Operands.draw, problem))

    def leaves(o):
        return [o.x, *(o.lora_as + o.lora_bs + o.magnitudes if adapted else ())]

    def bind(i):
        o = draw(i)
        if name in (PEER, COMPILED):  # its modules hold parameters
            a, b, m = (tuple(map(torch.nn.Parameter, ts)) for ts in (o.lora_as, o.lora_bs, o.magnitudes))
            o = replace(o, lora_as=a, lora_bs=b, magnitudes=m)
        layers = [bench_quantised.layer_of(weight) for weight in o.weights if problem.nf4]
        if layers:
            run = _in_nf4(name, o, layers)
        else:
            run = _peft(o, peers.compiled()) if name == COMPILED else PROVIDERS[name](o)
        codes = [part for layer in layers for part in base_of(layer)[:6]]
        return Call(lambda: [run(o.x)], leaves(o), [o.dy], [*o.weights, *codes, *leaves(o)[1:]])

    def plain(dtype):
        o = draw(0) if dtype is None else draw(0).to(dtype)
        y = _frozen(o)(o.x)
        if problem.nf4 and name == PEER:
            y = _gated(*map(partial(partial, _as_peft_in_4_bits), o.weights, o.lora_as, o.lora_bs))(o.x)
        elif adapted and problem.dora:
            operands = o.x, o.weights, o.lora_as, o.lora_bs, o.magnitudes, [None] * 3, [SCALE] * 3, [0.0] * 3
            y = eager_dora_mlp(*operands, [None] * 3, "silu")
        elif adapted:
            operands = o.x, o.weights, o.lora_as, o.lora_bs, [None] * 3, [SCALE] * 3, [0.0] * 3, [None] * 3
            y = eager_lora_mlp(*operands, "silu")
        return [y, *torch.autograd.grad(y, leaves(o), o.dy)]

    return Variant(name, bind, plain, partial(problem.traffic, adapted=adapted), own=name in (OURS, LAYERS))


def case(problem: Problem, names=None, compiles: bool = False) -> harness.Case:
    wanted = [name for name in names or PROVIDERS if name != COMPILED or (compiles and not problem.nf4)]
    (inner, k), *_ = problem.sizes
    sets = machine.argument_sets(problem.device, problem.dtype.itemsize * 3 * k * (inner + problem.rows))
    return harness.Case.of(problem, [variant(problem, name) for name in wanted], sets)


def problems(device: torch.device) -> list[Problem]:
    bits = [False, True] if importlib.util.find_spec("bitsandbytes") else [False]
    if device.type == "cuda":  # Llama-3.1-8B, Qwen3-4B
        shapes = ("4096x14336", 2048), ("4096x14336", 8192), ("2560x9728", 4096)
        listed = [Problem(shape, rows, 16, torch.bfloat16, device, nf4) for nf4 in bits for shape, rows in shapes]
        return [*listed, Problem("4096x14336", 2048, 16, torch.bfloat16, device, dora=True)]
    dense = [Problem(shape, 512, 16, torch.float32, device) for shape in ("512x1408", "1024x2816")]
    nf4 = [Problem("1024x2816", 512, 16, torch.bfloat16, device, True)] * bits[-1]
    return [*dense, *nf4, Problem("1024x2816", 512, 16, torch.float32, device, dora=True)]


def cases(options: argparse.Namespace) -> list[Callable[[], harness.Case]]:
    listed = problems(options.device)
    if options.shape:
        listed = [replace(listed[0], shape=shape) for shape in options.shape]
    listed = [replace(p, **command.given(options, "rows", "rank")) for p in listed]
    listed = listed[: 1 if options.quick else None]
    return [partial(case, p, options.variant, command.compiles(options, p is listed[0])) for p in listed]


def main(argv: list[str] | None = None) -> int:
    parser = command.parser("bench_mlp", __doc__, quick="the first case", variants=list(PROVIDERS))
    parser.add_argument("--shape", action="append", help="KxI; may be repeated")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--rank", type=int)
    command.add_compile(parser, "PEFT")
    return command.main(parser, cases, argv)


if __name__ == "__main__":
    sys.exit(main())
