"""multi_lora beside PEFT's mixed batch, gather and bmm, grouped_mm and the kernels of vLLM and SGLang.

    python -m bench.bench_multi_lora --device cpu --out rows.jsonl [--quick] [--shape 4096x4096] [--adapters zipf]
    pytest bench --benchmark-autosave --benchmark-compare      # one pytest-benchmark case for each provider

What is timed is a linear layer with its adapters: the base GEMM, then the low-rank terms. On a GPU that is done at 32
sites (--sites 128: a model of 32 layers) with weights of their own, cold, inside one CUDA graph where the provider can
be captured, as in a decoding step.
"""

import argparse
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial

import torch
import torch.nn.functional as F

from fastpeft import reference
from fastpeft.cuda import multi_lora as cuda
from fastpeft.ops import multi_lora_, route
from fastpeft.ops.multi_lora import REASONS

from . import command, engines, harness, history
from .harness import FORWARD, FROZEN, PEER, Call, Variant
from .mixed_batch import POPULARITIES, Mix, Problem, Site

SITES = 32  # on a GPU: layers in one graph
CPU = (("768x768", 32), ("768x3072", 32), ("768x768", 512))
GPU = (("4096x4096", 64), ("4096x14336", 64), ("4096x4096", 1), ("4096x4096", 256), ("4096x4096", 4096))


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
    except Exception:  # an engine that is there and does not work: the gate will say why, in its row
        return True
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
    made = harness.Case.of(problem, variants, sets)
    return replace(made, fields={**made.fields, "sites": sites}, passes=(FORWARD,), calls=sites)


def problems(device: torch.device) -> list[Problem]:
    """What is timed when nothing else is asked for; the most telling first, for a run that is cut short."""
    shapes, dtype = (GPU, torch.bfloat16) if device.type == "cuda" else (CPU, torch.float32)
    first = [Problem(shape, tokens, "16", "uniform", dtype, device) for shape, tokens in shapes]
    shape, tokens = shapes[0]
    ranks = [Problem(shape, tokens, rank, "uniform", dtype, device) for rank in ("mixed", "8", "64", "128")]
    mixes = [Problem(shape, tokens, "16", popularity, dtype, device) for popularity in POPULARITIES[1:]]
    return [*first, *mixes, *ranks]


def cases(options: argparse.Namespace) -> list[Callable[[], harness.Case]]:
    listed = problems(options.device)
    if options.shape or options.adapters:
        asked = replace(listed[0], tokens=options.tokens, rank=options.rank)
        listed = [
            replace(asked, shape=shape, popularity=popularity)
            for shape in options.shape or [asked.shape]
            for popularity in options.adapters or ["uniform"]
        ]
    listed = listed[: 2 if options.quick else None]
    return [partial(case, problem, options.variant, options.sites) for problem in listed]


def main(argv: list[str] | None = None) -> int:
    parser = command.parser("bench_multi_lora", __doc__, quick="the first two cases", variants=list(PROVIDERS))
    parser.add_argument("--shape", action="append", help="KxN; may be repeated")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rank", default="16", help='a number, or "mixed"')
    parser.add_argument("--adapters", action="append", choices=POPULARITIES, help="popularity; may be repeated")
    sites = "layers in a row, on a GPU in one CUDA graph (default: 32, on a CPU 1)"
    parser.add_argument("--sites", type=int, help=sites)
    return command.main(parser, cases, argv)


def pytest_generate_tests(metafunc):
    names = [FROZEN, PEER, "ours", "gather + bmm"]
    found = [(problem, name) for problem in problems(history.device())[:3] for name in names]
    ids = [f"{p.shape}-{p.tokens}-{name}".replace(" ", "_") for p, name in found]
    metafunc.parametrize(("problem", "name"), found, ids=ids)


def test_multi_lora(benchmark, problem, name):
    made = case(problem, [name])
    history.time_one(benchmark, made, FORWARD, made.sets)


if __name__ == "__main__":
    sys.exit(main())
