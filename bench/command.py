"""What the benchmarks' command lines share: their options, the run, its tables, the exit code."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from . import harness, report

QUICK = 5, 5.0  # rounds, seconds


def parser(prog: str, doc: str, quick: str, variants: Sequence[str] | None = None) -> argparse.ArgumentParser:
    """The options that every benchmark has; ``quick`` says what it cuts its cases to, ``variants`` are all names."""
    made = argparse.ArgumentParser(prog=prog, description=doc.partition("\n")[0])
    add = made.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", type=Path, help="append the rows to this file, a JSON object a line")
    add("--quick", action="store_true", help=f"{quick}, five rounds")
    add("--variant", action="append", choices=variants, help="a name; may be repeated")
    add("--threads", type=int, help="of PyTorch on the CPU")
    add("--rounds", type=int, default=25)
    add("--seconds", type=float, default=20.0, help="limit of one case's timing")
    add("--total", type=float, default=float("inf"), help="no case is begun after so many seconds")
    add("--gate-only", action="store_true", help="check, do not time")
    return made


def add_compile(made: argparse.ArgumentParser, what: str) -> None:
    """For benchmarks with a variant of torch.compile, which takes seconds for each shape."""
    made.add_argument("--compile", choices=("auto", "yes", "no"), default="auto", help=f"time torch.compile of {what}")
    made.add_argument("--no-compile", action="store_const", const="no", dest="compile", help="the same as --compile no")


def compiles(options: argparse.Namespace, usual: bool) -> bool:
    """``usual``: whether the case is among those that stand for all when nothing is asked for."""
    return options.compile == "yes" or (options.compile == "auto" and usual)


def given(options: argparse.Namespace, *names: str) -> dict:
    """Those of the options that were given, as what ``dataclasses.replace`` takes."""
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}


def main(
    made: argparse.ArgumentParser,
    cases: Callable[[argparse.Namespace], Sequence[Callable[[], harness.Case]]],
    argv: Sequence[str] | None,
) -> int:
    """Run ``cases(options)``, ``options.device`` being a torch.device, and print what came of it.

    Returns 0; 1 where a variant of ours was refused, a case failed or there is no row; 2 without the device.
    """
    options = made.parse_args(argv)
    options.device = torch.device(options.device)
    if options.device.type == "cuda" and not torch.cuda.is_available():
        print(f"{made.prog}: --device {options.device}, but torch {torch.__version__} sees no GPU", file=sys.stderr)
        return 2
    if options.threads:
        torch.set_num_threads(options.threads)
    rounds, limit_s = QUICK if options.quick else (options.rounds, options.seconds)
    listed = [lambda make=make: make().only(options.variant) for make in cases(options)]
    rows, failed = harness.run(listed, options.out, rounds, limit_s, options.gate_only, options.total)
    print(report.table(rows), report.short(rows), sep="\n\n")
    failed += sorted({f"REFUSED {row['variant']}: {row['refused']}" for row in rows if row["own"] and row["refused"]})
    failed += [] if rows else ["no rows"]
    print(*failed, sep="\n", end="\n" if failed else "")
    return 1 if failed else 0
