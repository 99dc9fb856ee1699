"""The table: ``python -m bench.static --help``."""

import argparse
import itertools
import os
import sys

import torch

from .launches import Launch
from .layer import Layer, added, steps
from .model import predict, seconds
from .others import OPS

HEADER = (
    "**predicted** for an H100 SXM; registers, programs a multiprocessor (that fit / that there are), instructions of\n"
    "the longest loop for a warp, and MB are the compiler's. Floor: one pass over the large operand.\n"
)


def kinds(counts) -> str:
    """Instructions by kind, the most frequent first, and how many in all."""
    return f"{counts.total()}: " + " ".join(f"{name} {count}" for name, count in counts.most_common(9))


def row(launch) -> str:
    """One launch."""
    if not isinstance(launch, Launch):
        return f"{launch.name:22} {seconds(launch) * 1e6:6.1f} us predicted, {launch.bytes / 1e6:.1f} MB"
    found, c = predict(launch), launch.constants
    tile = "x".join(str(c[name]) for name in ("BLOCK_M", "BLOCK_K", "BLOCK_R") if name in c)
    limits = sorted(found.parts.items(), key=lambda part: -part[1])[:3]
    return (
        f"{launch.name:22} {found.seconds * 1e6:6.1f} us predicted, {found.moved / 1e6:.1f} MB; "
        f"{tile} w{found.code.warps} s{c.get('num_stages', '-')} grid {'x'.join(map(str, launch.grid))}; "
        f"{found.code.registers} registers, {found.code.spills} spills, {found.code.shared >> 10} KB, "
        f"{found.fit}/{found.resident} programs; "
        f"limits {', '.join(f'{name} {t * 1e6:.0f}' for name, t in limits)} (issue at 1: {found.issue * 1e6:.0f}); "
        f"loop {kinds(found.code.main)}"
    )


def layers(options) -> list[Layer]:
    """Every combination that was asked for."""
    adapters = [getattr(torch, name) for name in options.adapters]
    rows = itertools.product(options.rank, adapters, options.dropout, options.rows)
    return [Layer(*case, options.inputs, options.outputs, options.branches) for case in rows]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.static", description=__doc__)
    parser.add_argument("--op", choices=("lora_linear", *OPS), default="lora_linear", help="(default: lora_linear)")
    parser.add_argument("--rank", type=int, nargs="+", default=[8, 16, 64])
    parser.add_argument("--adapters", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0, 0.1])
    parser.add_argument("--rows", type=int, nargs="+", default=[8192])
    parser.add_argument("--inputs", type=int, default=4096)
    parser.add_argument("--outputs", type=int, default=4096)
    parser.add_argument("--branches", type=int, default=1, help="projections of one x, as q, k and v; up is one's")
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--layers", action="store_true", help="one line a layer instead of one a launch")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("bench.static: TRITON_INTERPRET=1 is set, expected it unset: nothing is compiled then")
    print(HEADER)
    for layer in layers(options):
        found = []
        if not options.layers:
            print(f"## {layer}")
        for step, floor, launched in OPS.get(options.op, steps)(layer, options.arch):
            found.append((step, floor, launched))
            for launch in launched if not options.layers else ():
                print(f"{step:12} floor {floor * 1e6:5.1f} | {row(launch)}", flush=True)
        parts = " ".join(f"{step} {sum(map(seconds, launched)) * 1e6:.0f}" for step, _, launched in found)
        count = sum(len(launched) for *_, launched in found)
        floor = sum(floor for _, floor, _ in found)
        total = sum(seconds(launch) for *_, launched in found for launch in launched)
        words = f"{options.op} {total * 1e6:.0f} us predicted"
        if options.op == "lora_linear":
            words = f"+{added(layer, found) * 1e6:.0f} us predicted over the frozen layer"
        print(
            f"{layer}: {words} ({parts}; {count} launches; floor {floor * 1e6:.0f})\n",
            flush=True,
        )


if __name__ == "__main__":
    main()
