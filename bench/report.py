"""Rows for people: a table of every variant, and a short one of the ratios that decide.

python -m bench.report rows.jsonl        # the short one, of whatever the file holds
"""

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from .harness import BOTH, CASE, FORWARD, FROZEN, PASSES, PEER

ADAPTERHUB, WHOLE, EAGER = "adapters", "whole weight", "eager"
# What our variants are set beside, the first that was timed; every other op is set beside the frozen linear.
YARDSTICKS = {
    "bottleneck": (ADAPTERHUB, EAGER),
    "row_linear": (WHOLE,),
    "token_rows": (PEER, WHOLE),
    "last 2 blocks": (PEER,),
    "block": (PEER,),
    "block, checkpointed": (PEER,),
    "6 blocks": (PEER,),
    "6 blocks, checkpointed": (PEER,),
}


def table(rows: Sequence[dict]) -> str:
    """A block for each case, a line for each variant."""
    columns = "".join(
        f"{which + ' us':>11} {'p20-p80':>17} {'xfloor':>6} {'xfrozen':>7} {'xPEFT':>6}" for which in PASSES
    )
    lines = []
    for facts, block in groupby(rows, _case):
        settings = [f"{name}={value}" for name, value in zip(CASE[2:], facts[2:], strict=True) if value is not None]
        lines += ["", "  ".join([*facts[:2], *settings])]
        lines.append(f"  {'variant':22}{columns} {'saved MB':>9} {'err max':>8} {'rms':>5}")
        for name, of_variant in groupby(block, lambda row: row["variant"]):
            of_variant = list(of_variant)
            lines.append(f"  {name:22}{''.join(map(_cells, of_variant))} {_memory(of_variant[0])}")
    return "\n".join(lines)


def short(rows: Sequence[dict]) -> str:
    """Of every op the ratios that decide."""
    layers = [row for row in rows if row["op"] not in YARDSTICKS]
    ops = [[row for row in layers if _family(row) == family] for family in dict.fromkeys(map(_family, layers))]
    others = [row for row in rows if row["op"] in YARDSTICKS]
    return "\n\n".join([*map(summary, ops), *([beside(others)] if others else [])])


def summary(rows: Sequence[dict]) -> str:
    """Time over the frozen linear, of the longest pass: a line for each case, a column for each variant."""
    longest = BOTH if any(row["pass"] == BOTH for row in rows) else FORWARD
    timed = {(_case(row), row["variant"]): row["ratio_frozen"] for row in rows if row["pass"] == longest}
    names = [name for name in dict.fromkeys(name for _, name in timed) if name != FROZEN]
    widths = [max(8, len(name)) for name in names]
    lines = [f"{_family(rows[0])}: time over the frozen linear's, {longest}"]
    lines.append(" " * 44 + "  ".join(map(str.rjust, names, widths)))
    for facts in dict.fromkeys(facts for facts, _ in timed):
        shape, count, dtype, rank, dropout, adapters = facts[1:]
        cells = [timed.get((facts, name)) for name in names]
        cells = ["-" if ratio is None else f"{ratio:.3f}" for ratio in cells]
        label = f"{shape} rows={count} {dtype} r={rank} " + (f"p={dropout}" if adapters is None else adapters)
        lines.append(f"{label:44}" + "  ".join(map(str.rjust, cells, widths)))
    return "\n".join(lines)


def beside(rows: Sequence[dict]) -> str:
    """Time and saved bytes over those of the op's yardstick: a line for each of our variants and passes."""
    lines = ["Time over another way's"]
    timed = {(_case(row), row["pass"], row["variant"]): row for row in rows if row["median_us"]}
    for (facts, which, name), row in timed.items():
        bases = (timed.get((facts, which, base)) for base in YARDSTICKS[row["op"]])
        base = next((found for found in bases if found is not None), None)
        if not row["own"] or base is None:
            continue
        label = f"{row['op']} {row['shape']} rows={row['rows']} {row.get('adapters') or ''}".rstrip()
        line = f"{label:36} {name:16} {which:7} {row['median_us'] / base['median_us']:.3f} of {base['variant']}'s"
        if which == BOTH and row["saved_bytes"] and base["saved_bytes"]:
            line += f", keeping {row['saved_bytes'] / base['saved_bytes']:.2f}"
        lines.append(line)
    return "\n".join(lines)


def _family(row: dict) -> str:
    """Projections that share their input stand in one table with those that do not."""
    return row["op"].removesuffix("_shared")


def _case(row: dict) -> tuple:
    return tuple(row.get(key) for key in CASE)


def _cells(row: dict) -> str:
    if row["median_us"] is None:
        return f"{'refused' if row['refused'] else 'not timed':>11}" + " " * 40
    spread = f"{row['p20_us']:.0f}-{row['p80_us']:.0f}"
    ratios = [row["median_us"] / row["floor_us"], row["ratio_frozen"], row["ratio_peft"]]
    cells = ["-" if ratio is None else f"{ratio:.3f}" for ratio in ratios]
    return f"{row['median_us']:11.1f} {spread:>17} {cells[0]:>6} {cells[1]:>7} {cells[2]:>6}"


def _memory(row: dict) -> str:
    saved = "-" if row["saved_bytes"] is None else f"{row['saved_bytes'] / 1e6:.2f}"
    errors = [" -" if row[e] is None else f"{row[e]:.2f}" for e in ("error_max", "error_rms")]
    return f"{saved:>9} {errors[0]:>8} {errors[1]:>5}  {row['refused'] or ''}".rstrip()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("rows_file", type=Path)
    file = parser.parse_args(argv).rows_file
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    print(short(rows) or f"no rows in {file}")
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())
