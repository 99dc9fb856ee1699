"""Draws rows as a picture: time over the frozen linear's, for every variant and shape, forward and forward+backward.

    python -m bench.plot rows.jsonl overhead.png [--rank 16] [--rows 8192] [--op lora_linear]

The frozen linear is the line at 1: what the same layer costs without an adapter. Whiskers are p20-p80.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

PASSES = ("fwd", "fwd+bwd")
TITLES = {"fwd": "forward", "fwd+bwd": "forward + backward"}
# Ours in strong colours, peers in greys and muted tones; one colour a variant in every picture (Okabe, Ito).
COLOURS = {
    "ours": "#0072B2",
    "ours, base dtype": "#56B4E9",
    "ours, separate calls": "#009E73",
    "PEFT": "#444444",
    "PEFT, base dtype": "#8c8c8c",
    "PEFT, torch.compile": "#CC79A7",
    "addmm form": "#E69F00",
    "ours, reference": "#c3dcea",
}
BASE = "frozen linear"
SETTING = ("rows", "dtype", "rank", "dropout")


def read(path: Path) -> list[dict]:
    """The timed rows of lora_linear in a file; of a case that was run several times, the last."""
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    rows = [row for row in rows if row["op"] in ("lora_linear", "lora_linear_shared")]
    keys = ("device", "op", "shape", *SETTING, "variant", "pass")
    return list({tuple(row[key] for key in keys): row for row in rows if row["median_us"] is not None}.values())


def plot(rows: Sequence[dict], out: Path) -> None:
    """One line of panels for each setting (rows, dtype, rank, dropout), one column for each pass."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [row for row in rows if row["variant"] in COLOURS and row["ratio_frozen"]]
    if not shown:
        raise ValueError("plot: no rows with a time and a ratio to the frozen linear")
    settings = list(dict.fromkeys(tuple(row[key] for key in SETTING) for row in shown))
    settings.sort(key=lambda setting: (-setting[0], setting[2], setting[3]))
    variants = [name for name in COLOURS if any(row["variant"] == name for row in shown)]
    panels = {setting: [row for row in shown if tuple(row[k] for k in SETTING) == setting] for setting in settings}
    heights = [len({row["shape"] for row in panel}) for panel in panels.values()]
    bar = 0.17 * (len(variants) + 1.2)
    figure, axes = plt.subplots(
        len(settings),
        2,
        figsize=(11, 1.3 + sum(0.75 + bar * height for height in heights)),
        height_ratios=[0.4 + bar * height for height in heights],
        squeeze=False,
        sharex="col",
        layout="constrained",
    )
    for line, (setting, panel) in zip(axes, panels.items(), strict=True):
        for axis, which in zip(line, PASSES, strict=True):
            _panel(axis, [row for row in panel if row["pass"] == which], variants)
        line[0].set_title(_words(setting), loc="left", fontsize=10, color="#333333")
        line[1].tick_params(labelleft=False)
    for axis, which in zip(axes[-1], PASSES, strict=True):
        axis.set_xlabel(f"{TITLES[which]}: time / frozen linear")
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[name]) for name in variants]
    figure.legend(handles, variants, loc="outside lower center", ncols=min(len(variants), 5), frameon=False, fontsize=9)
    versions = f"torch {rows[0]['torch']}, PEFT {rows[0]['peft']}, commit {rows[0]['commit']}; whiskers: p20-p80"
    figure.suptitle(f"LoRA over the frozen linear on {rows[0]['device']}\n{versions}", fontsize=11)
    figure.savefig(out, dpi=150)
    plt.close(figure)


def _panel(axis, rows: Sequence[dict], variants: Sequence[str]) -> None:
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    height = 1 / (len(variants) + 1.2)
    axis.axvline(1, color="#333333", linewidth=0.8)
    farthest = max((row["ratio_frozen"] for row in rows), default=1.0)
    for row in rows:
        middle = shapes.index(row["shape"]) + (variants.index(row["variant"]) - (len(variants) - 1) / 2) * height
        ratio, scale = row["ratio_frozen"], row["ratio_frozen"] / row["median_us"]
        axis.barh(middle, ratio - 1, left=1, height=0.88 * height, color=COLOURS[row["variant"]])
        axis.plot([row["p20_us"] * scale, row["p80_us"] * scale], [middle, middle], color="black", linewidth=0.7)
        end = max(ratio, row["p80_us"] * scale, 1.0)
        weight = "bold" if row["variant"] == "ours" else "normal"
        axis.text(end + 0.012 * farthest, middle, f"{ratio:.2f}", va="center", fontsize=7, fontweight=weight)
    axis.set_yticks(range(len(shapes)), [shape.replace("x", " → ", 1).replace("+", " + ") for shape in shapes])
    axis.set_ylim(len(shapes) - 0.5, -0.5)
    axis.grid(axis="x", color="#e5e5e5", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.margins(x=0.1)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)


def _words(setting: tuple) -> str:
    rows, dtype, rank, dropout = setting
    return f"{rows} rows, {dtype}, rank {rank}, " + (f"dropout {dropout}" if dropout else "no dropout")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("rows_file", type=Path)
    parser.add_argument("out", type=Path)
    for name, kind in (("op", str), ("rows", int), ("rank", int), ("dropout", float), ("dtype", str)):
        parser.add_argument(f"--{name}", type=kind, help=f"only rows with this {name}")
    arguments = parser.parse_args(argv)
    wanted = {name: value for name, value in vars(arguments).items() if name in ("op", *SETTING) and value is not None}
    rows = [row for row in read(arguments.rows_file) if all(row[name] == value for name, value in wanted.items())]
    try:
        plot(rows, arguments.out)
    except ValueError as error:
        print(f"{error} in {arguments.rows_file}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
