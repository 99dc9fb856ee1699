"""prompt_gather and prefix attention beside eager PyTorch, torch.compile and PEFT's way.

    python bench/bench_prompt.py --device cpu --out rows.jsonl [--quick] [--op prefix_attention] [--gate-only]

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
from pathlib import Path

import harness
import machine
import torch
import torch.nn.functional as F
from clock import SEED
from harness import FORWARD, FROZEN, PEER, Call, Variant
from torch import Tensor

from fastpeft.nn.prefix_attention import prefix_attention
from fastpeft.ops import prompt_gather
from fastpeft.testing import PromptProblem, eager_prompt_gather

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
        dtype = str(self.dtype).removeprefix("torch.")
        columns = {"op": self.op, "shape": self.shape, "rows": self.rows, "dtype": dtype, "rank": self.length}
        return {**columns, "adapters": self.adapters}

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
            function = partial(_attention, prefix=False) if frozen else _copied
            function = (_embedding if frozen else _eager) if gathering else function
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


def _embedding(a: Arguments) -> Tensor:
    return F.embedding(a.gather.ids, a.gather.table)


def _ours(a: Arguments, backend: str | None = None) -> Tensor:
    g = a.gather
    return prompt_gather(g.prompts, g.prompt_ids, g.ids, g.table, labels=g.labels, backend=backend).inputs_embeds


def _integers(g: PromptProblem, sizes: Tensor, width: int) -> tuple[Tensor, ...]:
    """Mask, positions and labels of right-padded rows, by arithmetic on all of them."""
    place = torch.arange(width, device=sizes.device)
    token = place - sizes[:, None]
    inside = (token >= 0) & (token < g.ids.shape[1])
    on = place < sizes[:, None] + g.ids.shape[1]
    labels = torch.where(inside, g.labels.gather(1, token.clamp(0, g.ids.shape[1] - 1)), -100)
    return on.long(), torch.where(on, place, 0), labels, inside, token


def _sizes(g: PromptProblem) -> list[int]:
    return [len(g.prompts[p]) if p >= 0 else 0 for p in g.prompt_ids]


def _eager(a: Arguments) -> Tensor:
    g = a.gather
    y = eager_prompt_gather(g.prompts, g.prompt_ids, _embedding(a))
    _integers(g, torch.tensor(_sizes(g), device=y.device), y.shape[1])
    return y


def _indexed(g: PromptProblem, which: Tensor, sizes: Tensor, starts: Tensor, width: int) -> tuple[Tensor, ...]:
    """All that may be in front of each other in one table, and every place an index into it."""
    x = F.embedding(g.ids, g.table)
    table = torch.cat([*(p.to(x.dtype) for p in g.prompts), x.flatten(0, 1), x.new_zeros(1, x.shape[2])])
    on, positions, labels, inside, token = _integers(g, sizes, width)
    first = sum(len(p) for p in g.prompts)
    rows = torch.arange(len(which), device=which.device)[:, None] * x.shape[1]
    place = torch.arange(width, device=which.device)
    at = torch.where(place < sizes[:, None], starts[:, None] + place, first + rows + token)
    at = torch.where((place < sizes[:, None]) | inside, at, len(table) - 1)
    return table[at], on, positions, labels


def _index(a: Arguments, function: Callable = _indexed) -> Tensor:
    g = a.gather
    sizes = _sizes(g)
    ends = torch.tensor([len(p) for p in g.prompts]).cumsum(0).tolist()
    starts = [ends[p] - len(g.prompts[p]) if p >= 0 else 0 for p in g.prompt_ids]
    which, sizes_, starts = (torch.tensor(t, device=g.ids.device) for t in (g.prompt_ids, sizes, starts))
    return function(g, which, sizes_, starts, g.ids.shape[1] + max(sizes))[0]


def _peft(a: Arguments) -> Tensor:
    """What PEFT's forward does where all rows have one prompt."""
    g = a.gather
    rows, length = g.ids.shape[0], len(g.prompts[0])
    tokens = torch.arange(length).unsqueeze(0).expand(rows, -1).to(g.ids.device)
    mask = torch.ones_like(g.ids)
    torch.cat((torch.ones(rows, length).to(mask.device), mask), dim=1)
    x = F.embedding(g.ids, g.table)
    torch.cat((torch.full((rows, length), -100).to(g.labels.device), g.labels), dim=1)
    return torch.cat((F.embedding(tokens, g.prompts[0]).to(x.dtype), x), dim=1)


def _attention(a: Arguments, prefix: bool = True) -> Tensor:
    q, k, v, pk, pv = a.inputs
    if not prefix:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return prefix_attention(q, k, v, [(pk, pv, None)], None, True, q.shape[-1] ** -0.5)


def _copied(a: Arguments) -> Tensor:
    """PEFT's way: a copy of the prefix for every row, in front of its keys and values, and a mask."""
    q, k, v, pk, pv = a.inputs
    t, length = q.shape[2], pk.shape[1]
    k, v = (torch.cat([p.repeat(len(q), 1, 1, 1), own], 2) for p, own in ((pk, k), (pv, v)))
    sees = torch.ones(t, length + t, dtype=torch.bool, device=q.device).tril(length)
    return F.scaled_dot_product_attention(q, k, v, sees)


def providers(problem: Problem, compiled: bool = False) -> list[Provider]:
    if problem.op == OPS[1]:
        listed = [Provider(FROZEN, partial(_attention, prefix=False)), Provider(PEER, _copied)]
        listed += [Provider("PEFT, torch.compile", torch.compile(_copied, dynamic=False))] if compiled else []
        return [*listed, Provider("ours", _attention, own=True)]
    listed = [Provider(FROZEN, _embedding)]
    listed += [Provider(PEER, _peft)] if problem.adapters == MIXES[0] else []
    listed += [Provider("ours", _ours, own=True), Provider("eager", _eager), Provider("index form", _index)]
    if compiled:
        function = torch.compile(_indexed, dynamic=False)
        listed.append(Provider("torch.compile", partial(_index, function=function)))
    if problem.device.type == "cuda":
        listed.append(Provider("ours, reference", partial(_ours, backend="reference"), own=True))
    return listed


def case(problem: Problem, compiled: bool = False, names: list[str] | None = None) -> harness.Case:
    """The problem as the harness takes it; on a GPU more argument sets than three caches hold."""
    draw = cache(partial(Arguments.draw, problem))
    cached = machine.cache_bytes(problem.device)
    sets = min(8, max(4, 1 + 3 * cached // problem.traffic(FORWARD)[0])) if cached else 1
    variants = [p.variant(problem, draw) for p in providers(problem, compiled) if names is None or p.name in names]
    return harness.Case({**problem.fields, "sets": sets}, variants, sets, problem.device, problem.dtype)


def problems(device: torch.device, ops: Sequence[str] = OPS) -> list[Problem]:
    """What is timed when nothing else is asked for."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    shapes = CPU if device.type == "cpu" else GPU
    mixes = {OPS[0]: MIXES, OPS[1]: MIXES[:1]}
    return [Problem(op, *size, mix, dtype, device) for op in ops for size in shapes[op] for mix in mixes[op]]


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(f"bench_prompt: --device {device}, but torch {torch.__version__} sees no GPU", file=sys.stderr)
        return 2
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    listed = problems(device, arguments.op or OPS)
    if arguments.quick:
        listed = [next(p for p in listed if p.op == op) for op in dict.fromkeys(p.op for p in listed)]
    changed = {"rows": arguments.rows, "length": arguments.length}
    listed = [replace(p, **{name: value for name, value in changed.items() if value is not None}) for p in listed]
    cases = [partial(case, p, not arguments.no_compile, arguments.variant) for p in listed]
    rounds, limit_s = (5, 5.0) if arguments.quick else (arguments.rounds, arguments.seconds)
    rows = harness.run(cases, arguments.out, rounds, limit_s, arguments.gate_only, arguments.total)
    print(harness.table(rows), harness.summary(rows), sep="\n\n")
    refused = sorted({f"{row['variant']}: {row['refused']}" for row in rows if row["own"] and row["refused"]})
    for line in refused:
        print(f"REFUSED {line}")
    return 1 if refused or not rows else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="append the rows to this file, a JSON object a line")
    parser.add_argument("--op", action="append", choices=OPS, help="may be repeated")
    parser.add_argument("--quick", action="store_true", help="the first case of each op, five rounds")
    parser.add_argument("--rows", type=int, help="of the batch")
    parser.add_argument("--length", type=int, help="of the prompt or prefix")
    parser.add_argument("--variant", action="append", help="a name; may be repeated")
    parser.add_argument("--threads", type=int, help="of PyTorch on the CPU")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--seconds", type=float, default=20.0, help="limit of one case's timing")
    parser.add_argument("--total", type=float, default=float("inf"), help="no case is begun after so many seconds")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--gate-only", action="store_true", help="check, do not time")
    return parser


if __name__ == "__main__":
    sys.exit(main())
