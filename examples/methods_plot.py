"""The comparison of methods as a picture: accuracy against what each method trains, takes and keeps."""

from pathlib import Path

from results import COLUMNS, Row, tidy

PANELS = ("trained parameters", "a step (median)", "saved for backward")
OURS, THEIRS, HEAD = "#0072B2", "#888888", "#c9c9c9"


def plot(rows: dict[str, Row], path: Path) -> None:
    """Three panels with accuracy upwards; a dot a method, PEFT's hollow, the frozen heads as lines."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(PANELS), figsize=(13, 4.6), layout="constrained", sharey=True)
    for axis, title in zip(axes, PANELS, strict=True):
        panel(axis, rows, title)
    axes[0].set_xscale("log")
    axes[0].set_ylabel("test accuracy, %")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def panel(axis, rows: dict[str, Row], title: str) -> None:
    name, _, factor = COLUMNS[title]
    for method, row in rows.items():
        value = getattr(row, name)
        if row.step_s is None:  # a frozen head
            axis.axhline(100 * row.accuracy, color=HEAD, linewidth=1)
            axis.annotate(method, (0.01, 100 * row.accuracy), xycoords=("axes fraction", "data"), ha="left",
                          va="bottom", fontsize=7, color=THEIRS)  # fmt: skip
            continue
        ours = method.startswith("fastpeft")
        point = (factor * value, 100 * row.accuracy)
        axis.plot(*point, "o", color=OURS if ours else THEIRS, fillstyle="full" if ours else "none", markersize=6)
        if ours:
            axis.annotate(
                method.removeprefix("fastpeft "), point, xytext=(5, 3), textcoords="offset points", fontsize=8
            )
    unit = {"a step (median)": ", s", "saved for backward": ", MB"}.get(title, "")
    axis.set_xlabel(title + unit)
    axis.margins(x=0.15)
    tidy(axis)
