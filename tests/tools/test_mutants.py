"""Every mutant of the kernels, the reference and the ops must fail some test: a sample here, all by `make mutants`.

The mutants are in tests/tools/mutants/, one file an op, and tests/tools/mutants/run.py is what runs them.
"""

import os
import re
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
    assert len({str(mutant) for mutant in mutants}) == len(mutants)
    for mutant in mutants:
        source = (runner.ROOT / mutant.file).read_text()
        assert runner.edited(source, mutant) != source


PYTHON = """
one = 1
class A:
    @two
    def f(self):
        return (one +
            one)
def g():
    return one
"""
CUDA = """
int one = 1;  // {
struct A {
  __global__ void __launch_bounds__(one) f() {
    if (two) { return (one +
      one); } }
};
int g() { return one; }
"""


@pytest.mark.parametrize(("file", "method", "source"), [("a.py", "A.f", PYTHON), ("a.cu", "f", CUDA)])
def test_an_edit_is_of_its_function_alone(runner, file, method, source):
    def edited(where, old):
        return runner.edited(source, runner.Mutant(file, where, "test", old, "2", ()))

    assert edited("", "one") == source.replace("one", "2", 1)
    assert edited(method, "one + one") == re.sub(r"one \+\s+one", "2", source)
    assert edited("g", "one") == "2".join(source.rsplit("one", 1))
    for where, old, why in [
        ("h", "one", "h is no function there, expected one of"),
        (method, "one", "the text occurs . times in"),
        ("g", "two", "the text occurs 0 times in g"),
        ("", "return", "the text occurs 0 times outside of functions"),
    ]:
        with pytest.raises(ValueError, match=f"^{file}: test: {why}"):
            edited(where, old)


@pytest.mark.thorough
def test_the_tests_that_mutants_run_exist(runner):
    """A test that is renamed must not drop out of a list unseen: pytest refuses an id that it does not find."""
    tests = sorted({test for mutant in runner.load() for test in mutant.tests})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-qq", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, capture_output=True, text=True, cwd=runner.ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLE)
def test_a_sample_of_the_mutants_dies(name):
    command = [sys.executable, RUN, "--only", name, "--processes", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# What follows forks, so it needs a process that has not imported fastpeft.
PROLOGUE = """
import os, pathlib, run
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
CHECK = "if a.shape[0] == 0:"
def survivors(new):
    tests = ("tests/ops/lora_linear/test_errors.py::test_rank_0",)
    return run.run([run.Mutant("fastpeft/ops/lora_linear_arguments.py", "_branch", "test", CHECK, new, tests)], 1)
"""


def in_a_process(source: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(RUN.parent)}
    return subprocess.run([sys.executable, "-c", PROLOGUE + source], capture_output=True, text=True, env=environment)


@pytest.mark.thorough
def test_a_mutant_that_changes_nothing_survives():
    """The runner can tell: a comment is no mutant; where its line accepts what it refused, it is one."""
    done = in_a_process("""
assert survivors(CHECK + "  # here") == ["fastpeft/ops/lora_linear_arguments.py: test"]
assert survivors("if a.shape[0] < 0:") == []
""")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].endswith("SURVIVED")
    assert done.stdout.splitlines()[1].endswith("killed ops/lora_linear/test_errors.py::test_rank_0")


@pytest.mark.thorough
@pytest.mark.slow
def test_an_endless_loop_is_a_death():
    done = in_a_process("""
run.SECONDS = 12
assert survivors("while a.shape[0] == 0:\\n        pass\\n    " + CHECK) == []
""")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("killed (timeout) ops/lora_linear/test_errors.py::test_rank_0\n")


@pytest.mark.thorough
def test_waiting_for_ever_is_a_death():
    """It takes no processor time."""
    done = in_a_process("""
run.SECONDS, run.PATIENCE = 12, 1
assert survivors("while a.shape[0] == 0:\\n        __import__('time').sleep(1)\\n    " + CHECK) == []
""")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("killed (timeout) ops/lora_linear/test_errors.py::test_rank_0\n")


@pytest.mark.thorough
def test_a_timeout_of_a_test_that_is_slow_by_itself_is_no_verdict(tmp_path):
    test = "tests/ops/lora_linear/test_edges.py::test_drawn_shapes"
    done = in_a_process(f"run.SECONDS = 6\nrun.demand_speed({test!r}, pathlib.Path({str(tmp_path)!r}))")
    assert done.returncode == 1
    assert done.stderr.startswith(f"{test} does not pass in 1 s without a mutant: no verdict")


@pytest.mark.thorough
def test_a_process_that_has_the_package_tests_no_mutant():
    done = in_a_process("import fastpeft\nsurvivors(CHECK)")
    assert "RuntimeError: run: fastpeft is imported" in done.stderr
