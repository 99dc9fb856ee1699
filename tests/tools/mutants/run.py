"""Breaks the package in one place at a time and demands that a test fails.

    python tests/tools/mutants/run.py                  every mutant, two at a time; exit code 1 if one survives
    python tests/tools/mutants/run.py --only "dX"      those whose name holds "dX"
    python tests/tools/mutants/run.py --shard 1/6      every sixth, from the second on

A file beside this one holds the mutants of one op, and the tests that can see them::

    MUTANTS = {file: {function: {what is wrong: (a piece of the function; the mutant's[; a test to begin with])}}}
    TESTS = (pytest ids, in the order in which they run: those that kill most, fastest, first)

A function is named as in ``_down_kernel`` or ``Class.method``, and "" is what stands outside of all. The piece occurs
once in it, however its white space is broken into lines; it is no longer than that takes, so that a mutant outlives
changes of what is not its own.

Each mutant gets its own copy of the package. The tests run in a fork of a process that has torch and Triton loaded, in
Triton's interpreter. A crash counts as a death. So does a test that runs out of time, as where an edit makes a loop
endless, if the same test without the edit needs a sixth of that time; running out of memory does not.
"""

import argparse
import ast
import importlib.util
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
SECONDS = 60  # of processor time for one test, so that other work on the machine does not count
PATIENCE = 5  # times as long by the wall clock, for a test that waits, or whose work is another process's


class Mutant(NamedTuple):
    """One edit of one function of a file, and the pytest ids of the tests that can see it, in their order."""

    file: str
    function: str
    name: str
    old: str
    new: str
    tests: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.file}: {self.name}"


class Clock:
    """A pytest plugin: the process ends where a test takes too long, also inside C, where no Python handler would run.

    Memory that was overwritten can end in an endless loop in malloc.
    """

    SIGNALS = (signal.SIGPROF, signal.SIGALRM)

    def __init__(self, seconds: float):
        self.seconds = seconds
        for number in self.SIGNALS:
            signal.signal(number, signal.SIG_DFL)

    def pytest_runtest_logstart(self, nodeid):
        Path("test.txt").write_text(nodeid)
        signal.setitimer(signal.ITIMER_PROF, self.seconds)
        signal.alarm(PATIENCE * SECONDS)


def load() -> list[Mutant]:
    """Every mutant of every file here."""
    found = []
    for path in sorted(HERE.glob("*.py")):
        if path == Path(__file__).resolve():
            continue
        spec = importlib.util.spec_from_file_location(f"mutants_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for file, functions in module.MUTANTS.items():
            for function, edits in functions.items():
                for name, (old, new, *first) in edits.items():
                    found.append(Mutant(file, function, name, old, new, (*first, *module.TESTS)))
    return found


def edited(source: str, mutant: Mutant) -> str:
    """The mutant of ``source``, the text of its file; ValueError where the edit is not one, in one place."""
    spans = (python_functions if mutant.file.endswith(".py") else cuda_functions)(source)
    everywhere = [span for found in spans.values() for span in found]
    if mutant.function and mutant.function not in spans:
        raise ValueError(f"{mutant}: {mutant.function} is no function there, expected one of {', '.join(spans)}")
    places = []
    pattern = r"\s+".join(map(re.escape, mutant.old.split()))
    for match in re.finditer(pattern, source):
        inside = spans[mutant.function] if mutant.function else everywhere
        if any(start <= match.start() and match.end() <= stop for start, stop in inside) == bool(mutant.function):
            places.append(match.span())
    if len(places) != 1 or mutant.old == mutant.new:
        where = f"in {mutant.function}" if mutant.function else "outside of functions"
        raise ValueError(f"{mutant}: the text occurs {len(places)} times {where}, expected once:\n{mutant.old}")
    start, stop = places[0]
    return source[:start] + mutant.new + source[stop:]


def python_functions(source: str) -> dict[str, list[tuple[int, int]]]:
    """Where each function and method begins, decorators included, and ends; what lies in one is part of it."""
    lines = [0]
    for line in source.splitlines(keepends=True):
        lines.append(lines[-1] + len(line))
    found: dict[str, list[tuple[int, int]]] = {}

    def visit(nodes: list[ast.stmt], prefix: str) -> None:
        for node in nodes:
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = min([node, *node.decorator_list], key=lambda part: part.lineno)
                span = lines[first.lineno - 1], lines[node.end_lineno]
                found.setdefault(prefix + node.name, []).append(span)

    visit(ast.parse(source).body, "")
    return found


def cuda_functions(source: str) -> dict[str, list[tuple[int, int]]]:
    """Where each function of C++ begins and ends, its overloads together; structs and namespaces are seen through."""
    # Comments and strings may hold braces: they are blanked, so that places stay.
    blank = re.sub(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', lambda m: " " * len(m[0]), source, flags=re.DOTALL)
    found: dict[str, list[tuple[int, int]]] = {}
    begin = depth = 0
    name = None
    for match in re.finditer(r"[;{}]", blank):
        if name is None and match[0] == "{":
            attributes = r"__\w+__\([^)]*\)|^\s*#[^\n]*"  # as __launch_bounds__ is one, and lines of the preprocessor
            head = re.sub(attributes, "", blank[begin : match.start()], flags=re.MULTILINE)
            called = re.search(r"(\w+)\s*\(", head)
            if called:
                name, depth, start = called[1], 0, begin
        depth += {"{": 1, "}": -1, ";": 0}[match[0]]
        if name is not None and depth == 0:
            found.setdefault(name, []).append((start, match.end()))
            name = None
        if name is None:
            begin = match.end()
    return found


def copy_package(copy: Path) -> None:
    for part in ("fastpeft", "kernels", "csrc", "tests"):
        shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copy)


def break_copy(copy: Path, mutant: Mutant) -> None:
    path = copy / mutant.file
    path.write_text(edited(path.read_text(), mutant))


def start(copy: Path, tests: tuple[str, ...], seconds: float) -> int:
    """Fork a process that tests the copy; its exit code is pytest's, its output a file in the copy."""
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    os.chdir(copy)
    output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= {"PYTHONPATH": str(copy), "TMPDIR": str(copy)}  # what a death leaves behind goes with the copy
    tempfile.tempdir = None
    import pytest

    # Without --keep-duplicates pytest drops the test to begin with where a later id covers it too.
    options = ["-x", "-q", "-p", "no:cacheprovider", "--no-header", "--keep-duplicates"]
    os._exit(int(pytest.main([*options, *tests], plugins=[Clock(seconds)])))


def finish(pid: int) -> int:
    """Wait for the process, end what its tests left running, return its status."""
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    os.killpg(pid, signal.SIGKILL)  # the process itself is dead, and its number not yet free
    return os.waitpid(pid, 0)[1]


def verdict(status: int, copy: Path) -> tuple[bool, str]:
    """Whether the mutant is dead, and what killed it."""
    test = (copy / "test.txt").read_text() if (copy / "test.txt").exists() else "before any test"
    test = test.removeprefix("tests/")
    if os.WIFSIGNALED(status):
        if os.WTERMSIG(status) == signal.SIGKILL:
            return False, f"SURVIVED: out of memory in {test}"
        if os.WTERMSIG(status) in Clock.SIGNALS:
            return True, f"killed (timeout) {test}"
        return True, f"killed (signal {os.WTERMSIG(status)}) {test}"
    output = (copy / "output.txt").read_text()
    failed = [line for line in output.splitlines() if line.startswith("FAILED")]
    if os.waitstatus_to_exitcode(status) == 1 and failed:
        return True, f"killed {test}"
    if os.waitstatus_to_exitcode(status) == 0:
        return False, "SURVIVED"
    raise SystemExit(f"the tests did not run:\n{output}")


def demand_speed(test: str, folder: Path) -> None:
    """A timeout says something about the mutant only where the test without it is far from one."""
    copy = Path(tempfile.mkdtemp(dir=folder))
    copy_package(copy)
    if finish(start(copy, (test,), SECONDS / 6)):
        output = (copy / "output.txt").read_text()
        raise SystemExit(f"{test} does not pass in {SECONDS / 6:g} s without a mutant: no verdict\n{output}")


def run(mutants: list[Mutant], processes: int) -> list[str]:
    """Run the mutants, print a line for each, return the survivors."""
    if "fastpeft" in sys.modules:
        raise RuntimeError("run: fastpeft is imported, so every fork would test that instead of its mutant")
    waiting, running, survivors = list(mutants), {}, []
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            while waiting and len(running) < processes:
                mutant = waiting.pop(0)
                copy = Path(tempfile.mkdtemp(dir=folder))
                copy_package(copy)
                break_copy(copy, mutant)
                running[start(copy, mutant.tests, SECONDS)] = (mutant, copy, time.monotonic())
            pid = next((pid for pid in running if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)), None)
            if pid is None:
                time.sleep(0.05)
                continue
            status = finish(pid)
            mutant, copy, began = running.pop(pid)
            dead, why = verdict(status, copy)
            if os.WIFSIGNALED(status) and os.WTERMSIG(status) in Clock.SIGNALS:
                demand_speed((copy / "test.txt").read_text(), folder)
            survivors += [] if dead else [str(mutant)]
            print(f"{time.monotonic() - began:5.1f} s  {mutant!s:75}  {why}", flush=True)
            shutil.rmtree(copy)
    return survivors


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="only mutants whose file or name holds this text")
    parser.add_argument("--shard", default="0/1", help="I/N: every Nth mutant, counted from the Ith")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    first, step = map(int, options.shard.split("/"))
    mutants = [mutant for mutant in load() if options.only in str(mutant)][first::step]
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    sys.dont_write_bytecode = True
    import hypothesis  # noqa: F401  what the forks share is loaded here
    import torch._dynamo
    import triton.language  # noqa: F401

    torch.set_num_threads(1)
    survivors = run(mutants, options.processes)
    print(f"{len(mutants) - len(survivors)} of {len(mutants)} mutants killed")
    print(*(f"SURVIVED {name}" for name in survivors), sep="\n")
    return 1 if survivors or not mutants else 0


if __name__ == "__main__":
    sys.exit(main())
