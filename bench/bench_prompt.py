"""prompt_gather and prefix attention beside eager PyTorch, torch.compile and PEFT's way.

    python -m bench.bench_prompt --device cpu --out rows.jsonl [--quick] [--op prefix_attention] [--gate-only]

prompt_gather: token ids to padded embeddings with each row's prompt in front, mask, positions and labels to match. A
batch is "one prompt" for all rows, which PEFT can do too, or "tenants": prompts of 8 to 56 tokens, and none for one row
in eight. Frozen is the embedding alone. prefix_attention: of every row to its own keys and to a prefix that all share;
frozen is attention without one. Backward is to the prompts; to queries, keys, values and the prefix.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpeft.nn.prefix_attention import prefix_attention
from fastpeft.ops import prompt_gather
from fastpeft.testing import PromptProblem

from . import command, harness, machine, peers, prompt_peers
from .clock import SEED
from .harness import FORWARD, FROZEN, PEER, Call, Variant
from .report import EAGER

VOCABULARY = 32000
MIXES = ("one prompt", "tenants")
OPS = ("prompt_gather", "prefix_attention")
# prompt_gather: tokens x D, rows. prefix_attention: tokens x heads x head width, rows.
CPU = {"prompt_gather": (("128x384", 32), ("256x768", 16)), "prefix_attention": (("128x12x32", 16), ("256x12x64", 8))}
GPU = {
    "prompt_gather": (("2048x4096", 8), ("512x4096", 64)),
    "prefix_attention": (("2048x32x128", 8), ("512x32x128", 32)),
}


@dataclass(frozen=True)
class Problem:
    """One op on one shape; ``adapters`` says who is in the batch, ``length`` how long the prompt or prefix is."""

    op: str
    shape: str
    rows: int
    adapters: str
    dtype: torch.dtype
    device: torch.device
    length: int = 20

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(map(int, self.shape.split("x")))

    @property
    def lengths(self) -> tuple[int, ...]:
        return (self.length,) if self.adapters == MIXES[0] else tuple(range(8, 57, 8))

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        if self.adapters == MIXES[0]:
            return (0,) * self.rows
        return tuple(-1 if b % 8 == 7 else b % 8 for b in range(self.rows))

    @property
    def fields(self) -> dict:
        settings = {"rank": self.length, "adapters": self.adapters}
        return harness.columns(self.op, self.shape, self.rows, self.dtype, **settings)

    def traffic(self, which: str, frozen: bool = False) -> tuple[int, int]:
        """The least (bytes, operations)."""
        return (self._gathered if self.op == OPS[0] else self._attended)(which, frozen)

    def _gathered(self, which: str, frozen: bool) -> tuple[int, int]:
        (t, d), size = self.sizes, self.dtype.itemsize
        if frozen:
            return self.rows * t * (2 * d * size + 8), 0
        used = [self.lengths[p] for p in self.prompt_ids if p >= 0]
        width, tables = t + max(used, default=0), sum(self.lengths[p] for p in {*self.prompt_ids} - {-1})
        moved = self.rows * (t * d * size + width * d * size + 8 * (2 * t + 3 * width)) + 4 * tables * d
        backward = sum(used) * d * size + 4 * tables * d
        return moved + (0 if which == FORWARD else backward), 0

    def _attended(self, which: str, frozen: bool) -> tuple[int, int]:
        (t, h, d), size = self.sizes, self.dtype.itemsize
        p = 0 if frozen else self.length
        moved = self.rows * h * d * 4 * t * size + 2 * h * d * p * size
        operations = 4 * self.rows * h * t * (t / 2 + p) * d
        times = 1 if which == FORWARD else 3
        return int(moved * times), int(operations * (1 if which == FORWARD else 3.5))


@dataclass(frozen=True)
class Arguments:
    """Operands of one call and what they come to; ``inputs`` are what is differentiated, in order."""

    inputs: tuple[Tensor, ...]
    grad: Tensor
    gather: PromptProblem | None = None

    @staticmethod
    def draw(problem: Problem, index: int) -> "Arguments":
        device, seed = problem.device, SEED + index
        generator = torch.Generator().manual_seed(seed)

        def new(*size, dtype=problem.dtype):
            return torch.randn(size, generator=generator).to(device, dtype)

        if problem.op == OPS[0]:
            t, d = problem.sizes
            wide = torch.promote_types(problem.dtype, torch.float32)
            made = problem.lengths, problem.prompt_ids, t, d, problem.dtype, wide, device
            ids = torch.randint(VOCABULARY, (problem.rows, t), generator=generator).to(device)
            gather = replace(PromptProblem.make(*made, padded=False, seed=seed), table=new(VOCABULARY, d), ids=ids)
            return Arguments(tuple(p.requires_grad_() for p in gather.prompts), gather.dy, gather)
        t, h, d = problem.sizes
        own = [new(problem.rows, h, t, d) for _ in range(3)]
        prefix = [new(h, problem.length, d) for _ in range(2)]
        return Arguments(tuple(x.requires_grad_() for x in own + prefix), new(problem.rows, h, t, d))


@dataclass(frozen=True)
class Provider:
    """One way of computing the op: ``run(arguments)`` gives its output."""

    name: str
    run: Callable[[Arguments], Tensor]
    own: bool = False

    def variant(self, problem: Problem, draw: Callable[[int], Arguments]) -> Variant:
        frozen = self.name == FROZEN
        gathering = problem.op == OPS[0]

        def wrt(arguments: Arguments) -> Sequence[Tensor]:
            if frozen:
                return () if gathering else arguments.inputs[:3]
            return arguments.inputs

        def bind(i: int) -> Call:
            a = draw(i)
            grad = a.grad[:, : problem.sizes[0]] if frozen and gathering else a.grad
            static = (a.gather.table,) if gathering else ()
            call = Call(lambda: [self.run(a)], wrt(a), [grad], [*static, *(a.inputs if gathering else a.inputs[3:])])
            return _Alone(**call.__dict__) if frozen and gathering else call

        def plain(dtype: torch.dtype | None) -> Sequence[Tensor]:
            a = draw(0)
            if dtype is not None:
                a = _as(a, dtype)
            function = partial(_attention, prefix=False) if frozen else prompt_peers.peft_prefix
            function = (prompt_peers.embedding if frozen else prompt_peers.eager) if gathering else function
            y = function(a)
            return [y, *(torch.autograd.grad(y, wrt(a), a.grad) if wrt(a) else ())]

        return Variant(self.name, bind, plain, partial(problem.traffic, frozen=frozen), own=self.own)


class _Alone(Call):
    """An embedding that nobody trains has no backward."""

    def both(self) -> Sequence[Tensor]:
        return self.forward()


def _as(arguments: Arguments, dtype: torch.dtype) -> Arguments:
    inputs = tuple(x.detach().to(dtype).requires_grad_() for x in arguments.inputs)
    gather = arguments.gather
    if gather is not None:
        gather = replace(gather, prompts=inputs, table=gather.table.to(dtype))
    return Arguments(inputs, arguments.grad.to(dtype), gather)


def _ours(a: Arguments, backend: str | None = None) -> Tensor:
    g = a.gather
    return prompt_gather(g.prompts, g.prompt_ids, g.ids, g.table, labels=g.labels, backend=backend).inputs_embeds


def _attention(a: Arguments, prefix: bool = True) -> Tensor:
    q, k, v, pk, pv = a.inputs
    if not prefix:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return prefix_attention(q, k, v, [(pk, pv, None)], None, True, q.shape[-1] ** -0.5)


def providers(problem: Problem, compiled: bool = False) -> list[Provider]:
    if problem.op == OPS[1]:
        listed = [Provider(FROZEN, partial(_attention, prefix=False)), Provider(PEER, prompt_peers.peft_prefix)]
        listed += [Provider("PEFT, torch.compile", peers.compiled()(prompt_peers.peft_prefix))] if compiled else []
        return [*listed, Provider("ours", _attention, own=True)]
    listed = [Provider(FROZEN, prompt_peers.embedding)]
    listed += [Provider(PEER, prompt_peers.peft_prompt)] if problem.adapters == MIXES[0] else []
    listed += [
        Provider("ours", _ours, own=True),
        Provider(EAGER, prompt_peers.eager),
        Provider("index form", prompt_peers.index),
    ]
    if compiled:
        function = peers.compiled()(prompt_peers.indexed)
        listed.append(Provider("torch.compile", partial(prompt_peers.index, function=function)))
    if problem.device.type == "cuda":
        listed.append(Provider("ours, reference", partial(_ours, backend="reference"), own=True))
    return listed


def case(problem: Problem, compiled: bool = False) -> harness.Case:
    """The problem as the harness takes it."""
    draw = cache(partial(Arguments.draw, problem))
    sets = machine.argument_sets(problem.device, problem.traffic(FORWARD)[0], most=8)
    return harness.Case.of(problem, [p.variant(problem, draw) for p in providers(problem, compiled)], sets)


def problems(device: torch.device, ops: Sequence[str] = OPS) -> list[Problem]:
    """What is timed when nothing else is asked for."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    shapes = CPU if device.type == "cpu" else GPU
    mixes = {OPS[0]: MIXES, OPS[1]: MIXES[:1]}
    return [Problem(op, *size, mix, dtype, device) for op in ops for size in shapes[op] for mix in mixes[op]]


def cases(options: argparse.Namespace) -> list[Callable[[], harness.Case]]:
    listed = problems(options.device, options.op or OPS)
    first = [next(p for p in listed if p.op == op) for op in dict.fromkeys(p.op for p in listed)]
    changed = command.given(options, "rows", "length")
    # On a GPU a problem takes longer to compile than to time, so the first of each op stands for all.
    return [
        partial(case, replace(p, **changed), command.compiles(options, p.device.type == "cpu" or p in first))
        for p in (first if options.quick else listed)
    ]


def main(argv: list[str] | None = None) -> int:
    parser = command.parser("bench_prompt", __doc__, quick="the first case of each op")
    parser.add_argument("--op", action="append", choices=OPS, help="may be repeated")
    parser.add_argument("--rows", type=int, help="of the batch")
    parser.add_argument("--length", type=int, help="of the prompt or prefix")
    command.add_compile(parser, "the index form and of PEFT's copies")
    return command.main(parser, cases, argv)


if __name__ == "__main__":
    sys.exit(main())
