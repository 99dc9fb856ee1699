"""bench/gpu.sh from its first line to its last, on the null GPU, each step cut to seconds."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# The null GPU's launcher in Python's place: what it starts has no cuDNN, and finds values right.
PYTHON = """#!/bin/sh
[ "$1" = setup.py ] && exec {python} "$@"
exec {python} -m bench.nullgpu "$@"
"""


def test_every_step(tmp_path):
    python = tmp_path / "python"
    python.write_text(PYTHON.format(python=sys.executable))
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python), "NULLGPU_VALUES": "ignored", "BENCH_ARGS": "--dropout 0"}
    command = ["bash", str(ROOT / "bench/gpu.sh"), "--quick", str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    results = {line.split()[0]: line.split()[1] for line in (tmp_path / "out/summary.txt").read_text().splitlines()}
    steps = (
        "install",
        "env",
        "check",
        "tests",
        "bench",
        "serving",
        "bottleneck",
        "prompts",
        "experts",
        "mlp",
        "selective",
        "plot",
    )
    assert {name: results[name] for name in steps} == dict.fromkeys(steps, "ok"), said
    assert results["quantised"] in ("ok", "skipped:"), said  # by whether bitsandbytes is there
    rows = [json.loads(line) for line in (tmp_path / "out/rows.jsonl").open()]
    assert {row["op"] for row in rows} >= {"lora_linear", "multi_lora", "bottleneck", "prompt_gather"}
    assert all(row["device"].startswith("null GPU") for row in rows)
    assert not [row for row in rows if row["own"] and row["refused"]]
