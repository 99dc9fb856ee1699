"""Every mutant of the kernels, the reference and the ops must fail some test: a sample here, all by `make mutants`.

The mutants are in tests/mutants/, one file an op, and tests/mutants/run.py is what runs them.
"""

import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).parent / "mutants" / "run.py"
SAMPLE = ("unsigned lane", "first column ignored", "wrong order")  # those that die within seconds


@pytest.fixture(scope="module")
def runner():
    import importlib.util

    spec = importlib.util.spec_from_file_location("mutants_run", RUN)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_mutant_is_one_edit(runner):
    mutants = runner.load()
    assert len({(file, name) for file, name, *_ in mutants}) == len(mutants)
    for file, name, old, new in mutants:
        found = (runner.ROOT / file).read_text().count(old)
        assert found == 1, f"{file}: {name}: the text occurs {found} times"
        assert old != new


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLE)
def test_a_sample_of_the_mutants_dies(name):
    command = [sys.executable, RUN, "--only", name, "--processes", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_mutant_that_changes_nothing_survives(runner, tmp_path, monkeypatch):
    """The runner can tell: a comment added to a kernel is no mutant."""
    monkeypatch.setattr(runner, "TESTS", ("tests/test_lora_linear_errors.py::test_rank_0",))
    mutant = ("kernels/dropout.py", "a comment", "import triton\n", "import triton  # here\n")
    assert runner.run([mutant], 1) == ["kernels/dropout.py: a comment"]
