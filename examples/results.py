"""The demo's results as a table, two sentences and a picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

COLOURS = ("#c9c9c9", "#a3a3a3", "#0072B2", "#444444")  # head only, converged head, fastpeft, PEFT


@dataclass
class Row:
    """What one method reached and what it cost; None where it does not apply."""

    accuracy: float
    trained: int
    step_s: float | None = None
    saved_bytes: int | None = None
    peak_bytes: int | None = None


# title, of a row, format, factor to the unit of the title
COLUMNS = {
    "test accuracy": ("accuracy", "{:.1f} %", 100),
    "trained parameters": ("trained", "{:,.0f}", 1),
    "a step (median)": ("step_s", "{:.3f} s", 1),
    "saved for backward": ("saved_bytes", "{:.0f} MB", 1e-6),
    "peak memory": ("peak_bytes", "{:.0f} MB", 1e-6),
}


def table(rows: dict[str, Row], titles: Sequence[str] = tuple(COLUMNS)) -> str:
    """In Markdown, the columns lined up."""
    lines = [["", *titles], ["-"] + ["-:"] * len(titles)]
    lines += [[name, *(shown(row, title) for title in titles)] for name, row in rows.items()]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    lines[1] = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(
        "| " + " | ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:]))]) + " |"
        for line in lines
    )


def shown(row: Row, title: str) -> str:
    name, form, factor = COLUMNS[title]
    value = getattr(row, name)
    return "" if value is None else form.format(factor * value)


def same_losses(ours: Sequence[float], theirs: Sequence[float]) -> str:
    difference = max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))
    return f"At dropout 0 the losses of {len(ours)} steps differ from PEFT's by at most {difference:.1e}, relatively."


def same_predictions(ours: Tensor, in_peft: Tensor) -> str:
    same = (ours.argmax(1) == in_peft.argmax(1)).sum().item()
    difference, largest = (ours - in_peft).abs().max().item(), ours.abs().max().item()
    return (
        f"The saved adapter in plain PEFT predicts the same for {same} of {len(ours)} test texts; "
        f"logits (up to {largest:.0f}) differ by at most {difference:.1e}."
    )


def plot(rows: dict[str, Row], plain: dict[str, list[float]], losses: dict[str, list[float]], path: Path) -> None:
    """Losses on top, at dropout 0 and of the training; below what was reached and what it cost."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = dict(zip(rows, COLOURS, strict=True))
    figure = plt.figure(figsize=(11, 6.2), layout="constrained")
    top, bottom = figure.subfigures(2, 1)
    left, right = top.subplots(1, 2, width_ratios=(1, 2))
    curves(left, plain, colours, "Loss at dropout 0: one curve", window=1)
    curves(right, losses, colours, "Loss of the training, with dropout (mean of 10 steps)", window=10)
    panels = ("test accuracy", "a step (median)", "saved for backward", "peak memory")
    for axis, title in zip(bottom.subplots(1, len(panels)), panels, strict=True):
        bars(axis, rows, title, colours)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def curves(axis, losses: dict[str, list[float]], colours: dict[str, str], title: str, window: int) -> None:
    for width, style, (name, values) in zip((4, 1.5), ("-", "--"), reversed(losses.items()), strict=True):
        window = min(window, len(values))
        means = [sum(values[i - window : i]) / window for i in range(window, len(values) + 1)]
        steps = range(window, len(values) + 1)
        axis.plot(steps, means, style, color=colours[name], linewidth=width, label=name, alpha=0.35 if width > 2 else 1)
    axis.set_title(title, loc="left", fontsize=10)
    axis.set_xlabel("step")
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False)
    tidy(axis)


def bars(axis, rows: dict[str, Row], title: str, colours: dict[str, str]) -> None:
    name, _, factor = COLUMNS[title]
    shown_rows = {method: row for method, row in rows.items() if getattr(row, name) is not None}
    values = [factor * getattr(row, name) for row in shown_rows.values()]
    drawn = axis.bar(list(shown_rows), values, color=[colours[method] for method in shown_rows], width=0.7)
    axis.bar_label(drawn, [shown(row, title) for row in shown_rows.values()], fontsize=9)
    axis.set_xticks(range(len(shown_rows)), [method.replace(" ", "\n") for method in shown_rows], fontsize=8)
    axis.set_yticks([])
    axis.set_title(title.capitalize(), loc="left", fontsize=10)
    axis.margins(y=0.15)
    tidy(axis)
    axis.spines["left"].set_visible(False)


def tidy(axis) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#e5e5e5", linewidth=0.6)
    axis.set_axisbelow(True)
