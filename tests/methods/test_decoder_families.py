"""Prompts and prefixes on every decoder family of transformers: served, or refused with the reason; none wrong."""

import pytest

from tests.support.decoder_table import PAGE, every_row, row_of, table, transformers, written

# Windows with sinks and experts, a state of another name, positions by the mask and by padding, alibi, what is refused.
FEW = ("bloom", "deepseek_v3", "gpt_oss", "jamba", "opt", "roberta")


@pytest.mark.parametrize("family", FEW)
def test_a_few_families(family):
    """What the page says of them."""
    _, found = row_of(family)
    assert "wrong" not in {verdict for verdict, _ in found.values()}, found
    line = next(line for line in PAGE.read_text().splitlines() if line.startswith(f"| {family} |"))
    assert line in table([(family, found)], {})


@pytest.mark.thorough
@pytest.mark.slow
def test_every_family():
    """The whole table, printed as it is found; docs/families.md holds it."""
    if f"transformers {transformers.__version__}" not in PAGE.read_text():
        pytest.skip(f"the page is of another version than transformers {transformers.__version__}")
    rows, others = every_row()
    wrong = {family: found for family, found in rows if "wrong" in {verdict for verdict, _ in found.values()}}
    assert not wrong
    assert PAGE.read_text() == written(table(rows, others)), "write it anew: python -m tests.support.decoder_table"
