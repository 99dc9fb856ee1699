"""The Makefile: between them, `make test` and what `make test-all` adds run every test."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def dry(*arguments: str) -> list[list[str]]:
    """The words of each command that make would run; nothing is run."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    command = ["make", "--dry-run", "--always-make", "--no-print-directory", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [shlex.split(line) for line in done.stdout.replace("\\\n", " ").splitlines()]


def pytests(target: str) -> list[tuple[list[str], str]]:
    """What stands before each pytest, word by word, and after it."""
    commands = [" ".join(words).partition(" -m pytest ") for words in dry(target)]
    return [(before.split(), after) for before, run, after in commands if run]


def selected(target: str) -> list[str]:
    """What each pytest of the environment itself is told beside the number of processes: but for it, all of tests/."""
    own = [after for before, after in pytests(target) if before == [".venv/bin/python"]]
    return [re.sub(r"^-n logical --maxprocesses 8 --dist worksteal ", "", arguments) for arguments in own]


def test_every_test_is_in_one_of_two_sets():
    assert selected("test") == ["-m not thorough"]
    assert selected("test-all") == ["-m not thorough", "-m thorough"]


def test_nothing_else_leaves_a_test_out(pytestconfig):
    """No option of pyproject.toml, no conftest.py; what a marker skips says why."""
    assert pytestconfig.getini("testpaths") == ["tests"]
    words = {word.partition("=")[0] for word in pytestconfig.getini("addopts")}
    assert words == {"--import-mode", "--strict-markers", "--strict-config", "-ra"}
    chosen = r"collect_ignore|pytest_ignore_collect|pytest_deselected"
    found = [path.parent.name for path in ROOT.glob("tests/**/conftest.py") if re.search(chosen, path.read_text())]
    assert sorted(found) == ["engines", "nullgpu"]  # their environments are their own
    for name in found:
        assert [after for _, after in pytests(f"test-{name}")] == [f"tests/{name}"]


def test_older_versions_and_adapterhubs_library_are_in_test_all():
    commands = [(before, after.split()) for before, after in pytests("test-all")]
    overlays = {before[0].rpartition("/")[2]: after[-1] for before, after in commands if len(before) == 2}
    assert overlays == {"oldest": "oldest", "adapters": "tests/integrations/adapters"}


def test_continuous_integration_runs_all_of_it():
    assert "make test test-all test-engines" in (ROOT / ".ci/run").read_text()
