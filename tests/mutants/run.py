"""Breaks the package in one place at a time and demands that a test fails.

    python tests/mutants/run.py                  every mutant, two at a time; exit code 1 if one survives
    python tests/mutants/run.py --only "dX"      those whose name holds "dX"
    python tests/mutants/run.py --shard 1/6      every sixth, from the second on

Each mutant gets its own copy of the package. The tests run in a fork of a process that has torch and Triton loaded, in
Triton's interpreter, with tests ordered so that most mutants die within seconds. A crash counts as a death, running out
of time does not.
"""

import argparse
import importlib.util
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SECONDS = 600  # past this there is no verdict, and the mutant counts as alive
TESTS = (
    "tests/test_dropout.py::test_bits_are_those_of_the_formula",
    "tests/test_dropout.py::test_no_dropout",
    "tests/test_dropout.py::test_dropout_near_1_keeps_one_lane_value",
    "tests/test_dropout.py::test_dtype",
    "tests/test_lora_linear.py::test_the_definition_is_the_formula",
    "tests/test_lora_linear_peers.py::test_first_branch_served_for_all",
    "tests/test_dropout.py::test_every_seed_has_its_mask_in_the_shared_form",
    "tests/test_lora_linear_edges.py::test_leading_dimensions",
    "tests/test_lora_linear_errors.py::test_rank_0",
    "tests/test_lora_linear_torch.py::test_double_backward_is_a_clear_error",
    "tests/test_lora_linear_memory.py::test_only_x_and_s_are_kept_for_backward",
    "tests/test_dropout.py::test_an_element_at_the_threshold_is_kept",
    "tests/test_lora_linear_edges.py::test_fp32_adapters_are_used_in_fp32",
    "tests/test_lora_linear.py::test_integers_are_exact_where_sums_are_split",
    "tests/test_dropout.py::test_every_backend_draws_the_reference_mask",
    "tests/test_lora_linear_edges.py::test_what_is_trained",
    "tests/test_lora_linear_memory.py::test_nothing_is_read_or_written_outside",
    "tests/test_lora_linear_memory.py::test_offsets_are_64_bit",
    "tests/test_lora_linear_memory.py::test_any_strides",
    "tests/test_lora_linear_edges.py::test_autocast_is_the_same_as_casting_by_hand",
    "tests/test_lora_linear_torch.py::test_opcheck",
    "tests/test_lora_linear_edges.py::test_ranks",
    "tests/test_lora_linear_edges.py::test_ranks_of_projections_that_share_x",
    "tests/test_lora_linear.py::test_integers_are_exact",
    "tests/test_lora_linear.py::test_no_less_accurate_than_pytorch",
)


def load() -> list[tuple[str, str, str, str]]:
    """(file, what is wrong, old text, new text) of every mutant."""
    found = []
    for path in sorted(HERE.glob("*.py")):
        if path != Path(__file__).resolve():
            spec = importlib.util.spec_from_file_location(f"mutants_{path.stem}", path)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            found += [(file, name, *edit) for file, edits in module.MUTANTS.items() for name, edit in edits.items()]
    return found


def break_copy(copy: Path, file: str, old: str, new: str) -> None:
    for part in ("fastpeft", "kernels", "tests"):
        shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    source = (copy / file).read_text()
    if source.count(old) != 1 or old == new:
        raise SystemExit(f"{file}: the text of a mutant occurs {source.count(old)} times, expected once:\n{old}")
    (copy / file).write_text(source.replace(old, new))


def start(copy: Path) -> int:
    """Fork a process that tests the copy; its exit code is pytest's, its output a file in the copy."""
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    os.chdir(copy)
    output = os.open("output.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.path[:0] = [str(copy), str(copy / "tests")]
    os.environ["PYTHONPATH"] = str(copy)
    import pytest

    os._exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--no-header", *TESTS])))


def verdict(status: int, copy: Path) -> tuple[bool, str]:
    """Whether the mutant is dead, and what killed it."""
    if os.WIFSIGNALED(status):
        if os.WTERMSIG(status) == signal.SIGKILL:
            return False, "SURVIVED: out of time or of memory"
        return True, f"signal {os.WTERMSIG(status)}"
    output = (copy / "output.txt").read_text()
    failed = [line for line in output.splitlines() if line.startswith("FAILED")]
    if os.waitstatus_to_exitcode(status) == 1 and failed:
        return True, failed[0].split(" - ")[0].removeprefix("FAILED ").rpartition("/")[2]
    if os.waitstatus_to_exitcode(status) == 0:
        return False, "SURVIVED"
    raise SystemExit(f"the tests did not run:\n{output}")


def run(mutants: list, processes: int) -> list[str]:
    """Run the mutants, print a line for each, return the survivors."""
    waiting, running, survivors = list(mutants), {}, []
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            while waiting and len(running) < processes:
                file, name, old, new = waiting.pop(0)
                copy = Path(tempfile.mkdtemp(dir=folder))
                break_copy(copy, file, old, new)
                running[start(copy)] = (f"{file}: {name}", copy, time.monotonic())
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid:
                name, copy, began = running.pop(pid)
                dead, why = verdict(status, copy)
                survivors += [] if dead else [name]
                print(f"{time.monotonic() - began:5.1f} s  {name:75}  {why}", flush=True)
                shutil.rmtree(copy)
            for pid, (*_, began) in running.items():
                if time.monotonic() - began > SECONDS:
                    os.killpg(pid, signal.SIGKILL)
            time.sleep(0.05)
    return survivors


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="only mutants whose file or name holds this text")
    parser.add_argument("--shard", default="0/1", help="I/N: every Nth mutant, counted from the Ith")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    first, step = map(int, options.shard.split("/"))
    mutants = [m for m in load() if options.only in f"{m[0]}: {m[1]}"][first::step]
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
