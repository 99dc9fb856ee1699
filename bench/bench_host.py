"""What a step costs the host, on the GPU that computes nothing: time, launches, waits, copies, Python calls.

    python -m bench.nullgpu -m bench.bench_host --out bench/results/host.jsonl [--case block ...] [--unsloth]

Time is the process's, of all its threads, so that other work of the machine counts less; ways are interleaved in one
run and a row has the median of its rounds. A launch costs nothing here, and 2-3 us of a real driver's time: a way with
more launches is dearer by that than its ratio says. ``calls`` are Python functions entered; they repeat exactly.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from . import host_gated, machine, nullgpu
from .host_cases import FROZEN, PEFT, Case, Steps, cases, steps

WARMUP, ROUNDS, CALLS = 5, 15, 10


def measure(found: Steps, rounds: int = ROUNDS) -> dict[str, dict]:
    """The columns of each way: what it asks of the device, and the median of ``rounds`` interleaved times."""
    asked = {way: counts(step) for way, step in found.items()}
    spent = {way: [] for way in found}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for way, step in found.items():
                spent[way].append(_host_us(step))
    finally:
        gc.enable()
    medians = {way: statistics.median(times) for way, times in spent.items()}
    ratios = {f"ratio_{name}": medians.get(base) for name, base in (("frozen", FROZEN), ("peft", PEFT))}
    return {
        way: {
            "median_us": round(medians[way], 1),
            "p20_us": round(statistics.quantiles(times, n=5)[0], 1),
            "p80_us": round(statistics.quantiles(times, n=5)[-1], 1),
            "rounds": rounds,
            **{name: None if base is None else round(medians[way] / base, 3) for name, base in ratios.items()},
            **asked[way],
        }
        for way, times in spent.items()
    }


def counts(step: Callable[[], object]) -> dict[str, int]:
    """What one step, warm, asks of the device, and how many Python functions it enters."""
    for _ in range(WARMUP):
        step()
    found = nullgpu.counted(step)
    columns = {name: getattr(found, name) for name in ("launches", "syncs", "copies", "pageable", "missing")}
    return {**columns, "peak_bytes": _peak_bytes(step), "calls": _python_calls(step)}


def _peak_bytes(step: Callable[[], object]) -> int:
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


def _python_calls(step: Callable[[], object]) -> int:
    entered = 0

    def count(frame, event, argument):
        nonlocal entered
        entered += event == "call"

    with torch.autograd.set_multithreading_enabled(False):  # backward in this thread, which alone is profiled
        step()
        sys.setprofile(count)
        try:
            step()
        finally:
            sys.setprofile(None)
    return entered


def _host_us(step: Callable[[], object]) -> float:
    start = time.process_time()
    for _ in range(CALLS):
        step()
    return 1e6 * (time.process_time() - start) / CALLS


def rows_of(case: Case, rounds: int = ROUNDS, unsloth: bool = False) -> list[dict]:
    """A row for each way of one case. The tokens that a step reads are then zeros, which end no request."""
    with nullgpu.reads_zero():
        return [
            {**asdict(case), "way": way, **columns} for way, columns in measure(steps(case, unsloth), rounds).items()
        ]


def line(row: dict) -> str:
    asked = ", ".join(f"{row[name]} {name}" for name in ("launches", "syncs", "pageable", "calls"))
    ratio = "" if row["ratio_peft"] is None else f" ({row['ratio_peft']:.2f}x PEFT)"
    return f"    {row['way']:18} {row['median_us']:8.0f} us{ratio}, {asked}"


def main(argv: Sequence[str] | None = None) -> int:
    names = list(dict.fromkeys(case.name for case in cases()))
    parser = argparse.ArgumentParser(prog="bench_host", description=__doc__.partition("\n")[0])
    parser.add_argument("--case", action="append", choices=names, help="may be repeated; all unless given")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument(
        "--unsloth", action="store_true", help="its functions beside PEFT's layers, of gated blocks alone"
    )
    parser.add_argument("--out", type=Path, help="append the rows to this file, a JSON object a line")
    options = parser.parse_args(argv)
    if not nullgpu.is_loaded():
        print("bench_host: expected `python -m bench.nullgpu -m bench.bench_host`", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    facts = machine.facts(torch.device("cuda"))
    facts["host"] = machine.facts(torch.device("cpu"))["device"]
    for case in cases():
        if case.name not in (options.case or names) or (options.unsloth and case.name not in host_gated.NAMES):
            continue
        print(case, flush=True)
        found = [{**row, **facts} for row in rows_of(case, options.rounds, options.unsloth)]
        print("\n".join(map(line, found)), flush=True)
        if options.out is not None:
            with options.out.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in found)
        gc.collect()
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
