"""Draws rows of bench_memory.py as a picture: the peak of a training step above the base, for each way of adapting.

    python -m bench.plot_memory bench/results/memory.jsonl bench/results/memory.svg [--model NAME] [--tokens N]

One panel without and one with gradient checkpointing; a group of bars for each dtype of the adapters and dropout. The
dotted line is the frozen model's step. A step ends in the last hidden state: the head and its loss are alike in all.
Colours are chosen to be read on white and on dark.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

FROZEN, PEFT, OURS, UNSLOTH = "frozen", "PEFT", "ours", "Unsloth's functions"  # as bench_memory.py names them

COLOURS = {PEFT: "#8a8f98", UNSLOTH: "#c77c11", OURS: "#1f88d9"}
TEXT, LINE = "#7a828e", "#7a828e"  # between white's and dark's
SETTINGS = {  # adapters, autocast
    ("float32", False): "float32 adapters",
    ("float32", True): "float32 adapters, autocast",
    ("bfloat16", False): "bfloat16 adapters",
}


def read(path: Path, model: str, tokens: int) -> list[dict]:
    """The rows of a model's steps without its head; of a step that was run several times, the last."""
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    rows = [r for r in rows if (r["model"], r["tokens"]) == (model, tokens) and not r["head"] and not r["refused"]]
    keys = ("way", "adapters", "autocast", "dropout", "experts", "checkpointing")
    return list({tuple(row[key] for key in keys): row for row in rows}.values())


def plot(rows: Sequence[dict], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    if not rows:
        raise ValueError("plot_memory: no rows of this model and number of tokens")
    colours = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), TEXT)
    with plt.rc_context({**colours, "font.size": 10, "svg.hashsalt": "memory"}):
        figure, axes = plt.subplots(1, 2, figsize=(10.5, 5.2), sharey=True, layout="constrained")
        for axis, checkpointing in zip(axes, (False, True)):
            _panel(axis, [row for row in rows if row["checkpointing"] == checkpointing])
            axis.set_title("gradient checkpointing" if checkpointing else "every activation kept", loc="left")
        names = [way for way in COLOURS if any(row["way"] == way for row in rows)]
        handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[name]) for name in names]
        handles.append(plt.Line2D([], [], color=LINE, linestyle=":"))
        figure.legend(handles, [*names, "frozen model"], loc="outside lower center", ncols=4, frameon=False)
        first = rows[0]
        figure.suptitle(f"LoRA on {first['model']}, one row of {first['tokens']} tokens: peak above the weights, GiB")
        figure.savefig(out, transparent=True, dpi=160, metadata={"Date": None} if out.suffix == ".svg" else None)
        plt.close(figure)


def _panel(axis, rows: Sequence[dict]) -> None:
    groups = [(*setting, dropout) for setting in SETTINGS for dropout in (0.0, 0.05)]
    ways = [way for way in COLOURS if any(row["way"] == way for row in rows)]
    height = 0.8 / len(ways)
    for row in rows:
        peak = row["peak_bytes"] / 2**30
        if row["way"] == FROZEN:
            axis.axvline(peak, color=LINE, linestyle=":", linewidth=1.2)
            continue
        group = groups.index((row["adapters"], row["autocast"], row["dropout"]))
        middle = group + (ways.index(row["way"]) - (len(ways) - 1) / 2) * height
        axis.barh(middle, peak, height=0.92 * height, color=COLOURS[row["way"]])
        weight = "bold" if row["way"] == OURS else "normal"
        axis.text(peak, middle, f" {peak:.1f}" if peak >= 10 else f" {peak:.2f}", va="center", size=8, weight=weight)
    axis.set_yticks(
        range(len(groups)),
        [f"{SETTINGS[a, c]}\n" + (f"dropout {d}" if d else "no dropout") for a, c, d in groups],
    )
    axis.set_ylim(len(groups) - 0.5, -0.5)
    axis.spines[["top", "right", "left", "bottom"]].set_visible(False)
    axis.tick_params(axis="both", length=0)
    axis.tick_params(axis="x", labelbottom=False)
    axis.margins(x=0.12)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="plot_memory", description=__doc__.partition("\n")[0])
    parser.add_argument("rows_file", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="Llama-3.1-8B")
    parser.add_argument("--tokens", type=int, default=4096)
    options = parser.parse_args(argv)
    try:
        plot(read(options.rows_file, options.model, options.tokens), options.out)
    except ValueError as error:
        print(f"{error} in {options.rows_file}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
