"""lora_linear and lora_linear_shared beside the frozen linear, PEFT and the addmm form.

    python -m bench.bench_lora_linear --device cpu --out rows.jsonl [--quick] [--shape 768x3072] [--shape 768x768+768]
    pytest bench --benchmark-autosave --benchmark-compare      # one pytest-benchmark case for each provider

A shape is KxN, or KxN1+N2+... for projections that share their input. The ratio tables come from the first form, which
interleaves the variants and, on a GPU, rotates cold argument sets; the second keeps a history of times.
"""

import argparse
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

import torch
import torch.nn.functional as F

from fastpeft import _backend
from fastpeft.cuda import lora_linear as cuda
from fastpeft.ops import lora_linear, lora_linear_shared
from fastpeft.ops.lora_linear import REASONS
from fastpeft.reference import inverse_keep

from . import command, harness, history, machine, peers
from .harness import FROZEN, PEER
from .lora import SCALE, Arguments, Problem, Provider

CPU_SHAPES = ("768x768", "768x3072", "2048x2048", "768x768+768+768", "768x3072+3072")
GPU_SHAPES = ("4096x4096", "4096x1024", "4096x14336", "14336x4096", "8192x8192")
GPU_SHARED = ("4096x4096+1024+1024", "4096x14336+14336")


def _frozen(problem, weights):
    return lambda x: [F.linear(x, weight) for weight in weights]


def _peft(problem, *operands, wrap=lambda layer: layer):
    layers = [wrap(peers.peft_layer(*each, SCALE, problem.dropout)) for each in zip(*operands, strict=True)]
    return lambda x: [layer(x) for layer in layers]


def _addmm(problem, *operands):
    return lambda x: [peers.addmm_form(x, *each, SCALE, problem.dropout) for each in zip(*operands, strict=True)]


def _separate(problem, *operands, backend=None):
    settings = (None, SCALE, problem.dropout, None, backend)
    return lambda x: [lora_linear(x, *each, *settings) for each in zip(*operands, strict=True)]


def _shared(problem, weights, lora_as, lora_bs, backend=None):
    settings = [None, [SCALE] * len(weights), [problem.dropout] * len(weights), None, backend]
    return lambda x: list(lora_linear_shared(x, weights, lora_as, lora_bs, *settings))


class _FrozenByUs(torch.autograd.Function):
    """The GEMM of csrc/ without a low-rank term: whether it keeps up with cuBLAS is the first thing it has to show."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        none = x.new_empty(0)
        return cuda.linear(x, weight, x.new_empty(x.shape[0], 0), x.new_empty(weight.shape[0], 0), none)

    @staticmethod
    def backward(ctx, dy):
        (weight,) = ctx.saved_tensors
        ds, a = dy.new_empty(dy.shape[0], 0), dy.new_empty(0, weight.shape[1])
        return cuda.input_gradient(dy, weight, ds, a, 0.0, None), None


def _frozen_by_us(problem, weights):
    return lambda x: [_FrozenByUs.apply(x, weight) for weight in weights]


def _s_inside(problem, *operands):
    call = _separate(problem, *operands, backend="cuda")

    def forward(x):
        with cuda.computing_s_inside():
            return call(x)

    return forward


def cuda_providers(problem: Problem, form, ours) -> list[Provider]:
    """csrc/: its GEMM alone, with the low-rank term, and with S inside. None where it cannot serve the problem."""
    k, outs = problem.sizes
    shapes = (problem.rows, k), (problem.rank, k), *((n, size) for n in outs for size in (k, problem.rank))
    x, a, *rest = (torch.empty(shape, dtype=problem.dtype, device=problem.device) for shape in shapes)
    if REASONS["cuda"](x, [a] * len(outs), rest[::2], rest[1::2]) is not None:
        return []
    listed = [Provider("frozen, csrc", _frozen_by_us, None, own=True)]
    listed.append(ours("ours, cuda", partial(form, backend="cuda"), problem.dtype))
    if len(outs) == 1 and problem.rank <= cuda.INSIDE_RANK:
        listed.append(ours("ours, cuda, S inside", _s_inside, problem.dtype))
    return listed


def providers(problem: Problem, compile_peft: bool) -> list[Provider]:
    """Everybody who can run here, with PEFT's default adapters (float32), and in the base's dtype if it differs."""
    base, wide = problem.dtype, torch.promote_types(problem.dtype, torch.float32)
    ours = partial(Provider, own=True, inverse_keep=inverse_keep)
    form = _shared if problem.op == "lora_linear_shared" else _separate
    listed = [Provider(FROZEN, _frozen, None), Provider(PEER, _peft, wide), ours("ours", form, wide)]
    if base != wide:
        listed += [Provider("PEFT, base dtype", _peft, base), ours("ours, base dtype", form, base)]
    if form is _shared:
        listed.append(ours("ours, separate calls", _separate, wide))
    if compile_peft:
        compiled = partial(_peft, wrap=peers.compiled())
        listed.append(Provider("PEFT, torch.compile", compiled, wide))
    listed.append(Provider("addmm form", _addmm, base))  # it casts its adapters to the base's dtype anyway
    if problem.device.type == "cuda":  # on a CPU the reference serves, and the interpreter is there to prove kernels
        x, a = (torch.empty(1, 1, dtype=dtype, device=problem.device) for dtype in (base, wide))
        others = [name for name in _backend.ORDER if REASONS[name](x, [a]) is None][1:]
        listed += [ours(f"ours, {name}", partial(form, backend=name), wide) for name in others]
        listed += cuda_providers(problem, form, ours)
    return listed


def case(problem: Problem, compile_peft: bool = False, sets: int | None = None) -> harness.Case:
    """The problem as the harness takes it. Argument sets are drawn once, when first used."""
    draw = cache(partial(Arguments.draw, problem))
    k, outs = problem.sizes
    bytes_of_a_set = problem.dtype.itemsize * (problem.rows * (k + sum(outs)) + k * sum(outs))
    sets = sets or machine.argument_sets(problem.device, bytes_of_a_set)
    return harness.Case.of(problem, [p.variant(problem, draw) for p in providers(problem, compile_peft)], sets)


def problems(device: torch.device) -> list[Problem]:
    """What is timed when nothing else is asked for; the most telling first, for a run that is cut short."""
    if device.type == "cpu":
        return [Problem(shape, 512, torch.float32, 16, p, device) for shape in CPU_SHAPES for p in (0.0, 0.1)]
    main, rest = [(8192, 16, 0.1), (8192, 16, 0.0)], [(8192, 64, 0.1), (2048, 16, 0.1), (2048, 16, 0.0)]
    grid = [(GPU_SHAPES, main), (GPU_SHARED, main), (GPU_SHAPES, rest)]
    return [
        Problem(shape, rows, torch.bfloat16, rank, p, device)
        for shapes, settings in grid
        for rows, rank, p in settings
        for shape in shapes
    ]


def cases(options: argparse.Namespace) -> list[Callable[[], harness.Case]]:
    listed = problems(options.device)
    if options.shape:
        listed = [replace(listed[0], shape=shape, dropout=p) for shape in options.shape for p in (0.1, 0.0)]
    changed = command.given(options, "rows", "rank", "dropout")
    changed |= {"dtype": getattr(torch, options.dtype)} if options.dtype else {}
    listed = dict.fromkeys(replace(p, **changed) for p in listed)
    listed = list(listed)[: 2 if options.quick else None]
    return [partial(case, p, command.compiles(options, _stands_for_all(p)), options.sets) for p in listed]


def _stands_for_all(problem: Problem) -> bool:
    """A compilation takes seconds for each shape, so on a GPU the two commonest settings stand for all."""
    usual = problem.device.type == "cuda" and problem.rows >= 8192 and problem.rank == 16
    return usual and problem.shape in GPU_SHAPES[:3:2]


def _shape(text: str) -> str:
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*(\+[1-9]\d*)*", text):
        raise argparse.ArgumentTypeError(f"{text!r}, expected KxN or KxN1+N2")
    return text


def main(argv: list[str] | None = None) -> int:
    parser = command.parser("bench_lora_linear", __doc__, quick="the first two cases")
    parser.add_argument("--shape", action="append", type=_shape, help="KxN or KxN1+N2; may be repeated")
    parser.add_argument("--rows", type=int, help="rows of x")
    parser.add_argument("--rank", type=int)
    parser.add_argument("--dropout", type=float)
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"))
    parser.add_argument("--sets", type=int, help="argument sets that calls rotate through")
    command.add_compile(parser, "PEFT")
    return command.main(parser, cases, argv)


def pytest_generate_tests(metafunc):
    listed = [p for p in problems(history.device()) if p.rank == 16 and p.rows in (512, 8192)]
    found = [(p, provider.name, which) for p in listed for provider in providers(p, False) for which in harness.PASSES]
    ids = [f"{p.shape}-{p.dropout}-{name}-{which}".replace(" ", "_") for p, name, which in found]
    metafunc.parametrize(("problem", "name", "which"), found, ids=ids)


def test_lora_linear(benchmark, problem, name, which):
    history.time_one(benchmark, case(problem).only([name]), which, sets=4)


if __name__ == "__main__":
    sys.exit(main())
