"""The table of decoder families in docs/families.md: ``python -m tests.support.decoder_table`` writes it anew."""

import warnings
from collections.abc import Callable
from pathlib import Path

from tests.support import decoder_checks
from tests.support.decoders import Unbuildable, build, families, transformers

PAGE = Path(__file__).resolve().parents[2] / "docs" / "families.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
# Their recurrences take minutes without a GPU.
SLOW = {"kimi_linear": "its recurrence takes minutes on a CPU"}
Row = tuple[str, dict[str, tuple[str, str]]]


def row_of(family: str) -> Row:
    """The family, and for prompt and prefix what ``decoder_checks.verdict`` says."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers.logging.set_verbosity_error()
        model = build(family)
        return family, {kind: decoder_checks.verdict(model, kind) for kind in decoder_checks.CONFIGS}


def every_row(see: Callable[[str], None] = print) -> tuple[list[Row], dict[str, str]]:
    """All rows, each shown as it comes; and why others cannot be built."""
    rows, others = [], {}
    for family in families():
        try:
            if family in SLOW:
                raise Unbuildable(SLOW[family])
            rows.append(row_of(family))
        except Unbuildable as error:
            others[family] = str(error)
            continue
        see(f"{family:22}" + " | ".join(f"{k}: {v} {note}" for k, (v, note) in rows[-1][1].items()))
    return rows, others


def table(rows: list[Row], others: dict[str, str]) -> str:
    """What stands in the page."""
    lines = ["| family | prompt | prefix |", "|---|---|---|"]
    lines += [f"| {family} | {_cell(found['prompt'])} | {_cell(found['prefix'])} |" for family, found in rows]
    served = {kind: sum(found[kind][0] == "served" for _, found in rows) for kind in decoder_checks.CONFIGS}
    which = f"Of {len(rows)} families of transformers {transformers.__version__}"
    counts = f"{which}, prompts are served on {served['prompt']} and prefixes on {served['prefix']}."
    names = ", ".join(sorted(others))
    return f"{counts}\n\n" + "\n".join(lines) + f"\n\nNo small model could be built of: {names}."


def _cell(found: tuple[str, str]) -> str:
    verdict, note = found
    if verdict == "served":
        return "served"
    return note.partition(" does not serve ")[2].partition(": ")[2] or note.partition("attach: ")[2]


def written(text: str) -> str:
    """The page with this table."""
    page = PAGE.read_text()
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(written(table(*every_row())))
