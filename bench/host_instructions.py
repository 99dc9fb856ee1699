"""Instructions that a step costs the host, which repeat where its time does not; counted by Valgrind, in minutes.

    python -m bench.nullgpu -m bench.host_instructions --case block --out bench/results/host_instructions.jsonl

The cases and the ways are those of ``bench_host.py``. One thread does everything, backward too. Instructions are no
time: what misses the caches takes longer. But a ratio of them does not depend on what else the machine does.
"""

import argparse
import gc
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from . import machine, nullgpu
from .host_cases import FROZEN, PEFT, cases, steps

WARMUP, STEPS = 5, 3
_FOLDER = "HOST_INSTRUCTIONS"  # set where Valgrind runs us, to where it writes


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="host_instructions", description=__doc__.partition("\n")[0])
    parser.add_argument("--case", action="append", choices=list(dict.fromkeys(case.name for case in cases())))
    parser.add_argument("--only", help="a part of a case's words, as 'fwd+bwd, dropout 0.0, bfloat16'")
    parser.add_argument("--out", type=Path, help="append the rows to this file, a JSON object a line")
    options = parser.parse_args(argv)
    if not nullgpu.is_loaded() or shutil.which("valgrind") is None:
        print("host_instructions: expected `python -m bench.nullgpu -m bench.host_instructions`, and Valgrind")
        return 2
    if _FOLDER in os.environ:
        _count(options)
        return 0
    arguments = sys.argv[1:] if argv is None else argv
    with tempfile.TemporaryDirectory() as folder:
        command = [
            "valgrind",
            "--quiet",
            "--tool=callgrind",
            "--collect-atstart=no",
            f"--callgrind-out-file={folder}/out",
        ]
        command += [sys.executable, "-m", "bench.nullgpu", "-m", "bench.host_instructions", *arguments]
        subprocess.run(command, env=os.environ | {_FOLDER: folder}, check=True, stdout=sys.stderr)
        rows = [json.loads(line) for line in Path(folder, "rows").read_text().splitlines()]
        for number, row in enumerate(rows, start=1):
            total = re.search(r"^totals: (\d+)", Path(folder, f"out.{number}").read_text(), re.MULTILINE)
            row["instructions"] = round(int(total[1]) / STEPS)
    by_case = {}
    for row in rows:
        by_case.setdefault(row["case"], {})[row["way"]] = row["instructions"]
    for row in rows:
        ways = by_case[row["case"]]
        for name, way in (("frozen", FROZEN), ("peft", PEFT)):
            row[f"ratio_{name}"] = round(row["instructions"] / ways[way], 3) if way in ways else None
        print(f"{row['case']}, {row['way']}: {row['instructions']:,} instructions, {row['ratio_peft']} of PEFT's")
    if options.out is not None:
        facts = machine.facts(torch.device("cuda")) | {"host": machine.facts(torch.device("cpu"))["device"]}
        with options.out.open("a") as file:
            file.writelines(json.dumps(row | facts) + "\n" for row in rows)
    return 0


def _count(options: argparse.Namespace) -> None:
    """One dump of Valgrind's for each way of each case, and a line that says of what."""
    torch.set_num_threads(1)
    torch.autograd.set_multithreading_enabled(False)
    with Path(os.environ[_FOLDER], "rows").open("w") as file, nullgpu.reads_zero():
        for case in cases():
            if case.name not in (options.case or [case.name]) or (options.only or "") not in str(case):
                continue
            for way, step in steps(case).items():
                for _ in range(WARMUP):
                    step()
                gc.collect()
                gc.disable()
                torch._C._valgrind_toggle()
                for _ in range(STEPS):
                    step()
                torch._C._valgrind_toggle_and_dump_stats()
                gc.enable()
                print(json.dumps({"case": str(case), **asdict(case), "way": way}), file=file, flush=True)


if __name__ == "__main__":
    sys.exit(main())
