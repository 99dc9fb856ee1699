"""multi_lora beside PEFT's mixed batch, gather and bmm, grouped_mm and the kernels of vLLM and SGLang.

    python bench/bench_multi_lora.py --device cpu --out rows.jsonl [--quick] [--shape 4096x4096] [--adapters zipf]
    pytest bench --benchmark-autosave --benchmark-compare      # one pytest-benchmark case for each provider

What is timed is a linear layer with its adapters: the base GEMM, then the low-rank terms. On a GPU that is done at 32
sites (--sites 128: a model of 32 layers) with weights of their own, cold, inside one CUDA graph where the provider can
be captured, as in a decoding step.
Popularity of the adapters as Punica has it (identical, distinct, uniform, zipf), and base-only, half base and skewed.
"""

import argparse
import math
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from itertools import cycle
from pathlib import Path

import engines
import harness
import torch
import torch.nn.functional as F
from harness import FORWARD, FROZEN, PEER, Call, Variant
from torch import Tensor

from fastpeft import reference
from fastpeft.cuda import multi_lora as cuda
from fastpeft.ops import multi_lora_, route
from fastpeft.ops.multi_lora import REASONS

SITES = 32  # on a GPU: layers in one graph
POPULARITIES = ("uniform", "distinct", "identical", "zipf", "skewed", "half base", "base only")
CPU = (("768x768", 32), ("768x3072", 32), ("768x768", 512))
GPU = (("4096x4096", 64), ("4096x14336", 64), ("4096x4096", 1), ("4096x4096", 256), ("4096x4096", 4096))


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
        dtype = str(self.dtype).removeprefix("torch.")
        shown = {"op": "multi_lora", "shape": self.shape, "rows": self.tokens, "dtype": dtype, "rank": self.rank}
        return {**shown, "adapters": self.popularity}

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


def _ours(mix, site):
    routing = route(mix.token_slots, len(mix.scales))
    return lambda y, x: multi_lora_(y, x, site.lora_a, site.lora_b, routing, mix.scales, mix.ranks)


def _cuda(mix, site, ahead=False):
    """csrc/ in one launch. ``ahead``: begun during the base GEMM, an ordinary launch; all else is written by then."""
    x = site.weight.new_empty(len(mix.token_slots), site.weight.shape[1])
    if reason := REASONS["cuda"](x, [site.lora_a], [site.lora_b]):
        raise ValueError(reason)
    routing = route(mix.token_slots, len(mix.scales))

    def run(y, x):
        with cuda.reading_ahead() if ahead else nullcontext():
            return multi_lora_(y, x, site.lora_a, site.lora_b, routing, mix.scales, mix.ranks, "cuda")

    return run


def _added(engine):
    """An engine that adds to y, after the base GEMM."""

    def build(mix, site):
        run = engine(mix, site)
        return lambda x: run(F.linear(x, site.weight), x)

    return build


PROVIDERS = {
    FROZEN: lambda mix, site: partial(F.linear, weight=site.weight),
    PEER: engines.peft_layer,
    "ours": _added(_ours),
    "ours, cuda": _added(_cuda),
    "ours, cuda, reading ahead": _added(partial(_cuda, ahead=True)),
    "gather + bmm": _added(engines.gather_bmm),
    "grouped_mm": _added(engines.grouped_mm),
    "vLLM's kernels": _added(engines.vllm),
    "SGLang's kernels": _added(engines.sglang),
}
HOST_BOUND = {PEER}  # decides on the host in every call: no CUDA graph


def _variant(problem: Problem, name: str, draw) -> Variant:
    def bind(i: int) -> Call:
        x, mix, sites = draw(i)
        layers = [PROVIDERS[name](mix, site) for site in sites]

        def forward():
            with torch.no_grad():
                return [layer(x) for layer in layers]

        captured = problem.device.type == "cuda" and name not in HOST_BOUND
        return Call(_captured(forward) if captured else forward, [], [], [])

    def plain(dtype):
        x, mix, sites = draw(0)
        slots = mix.token_slots if name != FROZEN else torch.full_like(mix.token_slots, -1)
        to = (lambda t: t.to(dtype)) if dtype else (lambda t: t)
        return [
            reference.multi_lora(
                to(x), to(site.lora_a), to(site.lora_b), slots, mix.scales, mix.ranks, F.linear(to(x), to(site.weight))
            )
            for site in sites
        ]

    own = name.startswith("ours")
    traffic = partial(problem.traffic, adapters=name != FROZEN)
    return Variant(name, bind, plain, traffic, {"graph": problem.device.type == "cuda" and name not in HOST_BOUND}, own)


def _captured(forward):
    """``forward`` as one CUDA graph: what its launches cost the host is not what is compared."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        forward()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = forward()

    def replay():
        graph.replay()
        return outputs

    return replay


def _available(name: str, problem: Problem, draw) -> bool:
    """Whether a provider can run here at all: engines that are not installed have no rows."""
    try:
        _, mix, sites = draw(0)
        PROVIDERS[name](mix, sites[0])
    except (ImportError, ValueError):
        return False
    return True


def case(problem: Problem, names: list[str] | None = None, sites: int | None = None) -> harness.Case:
    """The problem as the harness takes it."""
    on_gpu = problem.device.type == "cuda"
    sites = sites or (SITES if on_gpu else 1)

    @cache
    def draw(i: int):
        generator = torch.Generator(problem.device).manual_seed(i)
        x = torch.randn(problem.tokens, problem.sizes[0], generator=generator, device=problem.device)
        return x.to(problem.dtype), Mix.draw(problem), [Site.draw(problem, generator) for _ in range(sites)]

    listed = [name for name in PROVIDERS if (names is None or name in names) and _available(name, problem, draw)]
    variants = [_variant(problem, name, draw) for name in listed]
    sets = 1 if on_gpu else 4  # 32 sites are more than a GPU's cache as they are
    facts = {**problem.fields, "sets": sets, "sites": sites}
    return harness.Case(facts, variants, sets, problem.device, problem.dtype, (FORWARD,), sites)


def problems(device: torch.device) -> list[Problem]:
    """What is timed when nothing else is asked for; the most telling first, for a run that is cut short."""
    shapes, dtype = (GPU, torch.bfloat16) if device.type == "cuda" else (CPU, torch.float32)
    first = [Problem(shape, tokens, "16", "uniform", dtype, device) for shape, tokens in shapes]
    shape, tokens = shapes[0]
    ranks = [Problem(shape, tokens, rank, "uniform", dtype, device) for rank in ("mixed", "8", "64", "128")]
    mixes = [Problem(shape, tokens, "16", popularity, dtype, device) for popularity in POPULARITIES[1:]]
    return [*first, *mixes, *ranks]


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(f"bench_multi_lora: --device {device}, but torch {torch.__version__} sees no GPU", file=sys.stderr)
        return 2
    listed = problems(device)
    if arguments.shape or arguments.adapters:
        dtype = listed[0].dtype
        listed = [
            Problem(shape, arguments.tokens, arguments.rank, popularity, dtype, device)
            for shape in arguments.shape or [listed[0].shape]
            for popularity in arguments.adapters or ["uniform"]
        ]
    cases = [
        partial(case, problem, arguments.variant, arguments.sites)
        for problem in listed[: 2 if arguments.quick else None]
    ]
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
    parser.add_argument("--quick", action="store_true", help="the first two cases, five rounds")
    parser.add_argument("--shape", action="append", help="KxN; may be repeated")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rank", default="16", help='a number, or "mixed"')
    parser.add_argument("--adapters", action="append", choices=POPULARITIES, help="popularity; may be repeated")
    parser.add_argument("--variant", action="append", choices=list(PROVIDERS), help="may be repeated")
    parser.add_argument(
        "--sites", type=int, help="layers in a row, on a GPU in one CUDA graph (default: 32, on a CPU 1)"
    )
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--seconds", type=float, default=20.0, help="limit of one case's timing")
    parser.add_argument("--total", type=float, default=float("inf"), help="no case is begun after so many seconds")
    parser.add_argument("--gate-only", action="store_true", help="check, do not time")
    return parser


def pytest_generate_tests(metafunc):
    """Here and not in a decorator, so that the script runs where pytest is not installed."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = [FROZEN, PEER, "ours", "gather + bmm"]
    cases = [(problem, name) for problem in problems(device)[:3] for name in names]
    ids = [f"{p.shape}-{p.tokens}-{name}".replace(" ", "_") for p, name in cases]
    metafunc.parametrize(("problem", "name"), cases, ids=ids)


def test_multi_lora(benchmark, problem, name):
    bound = case(problem, [name])
    (variant,) = bound.variants
    _, refused = harness.gate(variant)
    if refused:
        raise ValueError(f"{name} gets no number: {refused}")
    steps = cycle([variant.bind(i).forward for i in range(bound.sets)])

    def timed():
        next(steps)()
        if problem.device.type == "cuda":
            torch.cuda.synchronize(problem.device)

    benchmark.group = "  ".join(f"{k}={v}" for k, v in problem.fields.items())
    benchmark.pedantic(timed, rounds=12, warmup_rounds=4)


if __name__ == "__main__":
    sys.exit(main())
