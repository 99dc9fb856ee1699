"""bench/gpu.sh: it runs what there is, goes on after a failure, and says what failed."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import harness
from bench.harness import FROZEN, PEER

pytestmark = pytest.mark.thorough
ROOT = Path(__file__).resolve().parents[3]


def gpu_script(out, **variables):
    environment = {**os.environ, "PYTHON": sys.executable, **variables}
    command = ["bash", str(ROOT / "bench/gpu.sh"), "--dry", str(out)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)


@pytest.mark.slow
def test_gpu_script_runs_every_step(tmp_path):
    done = gpu_script(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    files = {path.name for path in tmp_path.iterdir()}
    assert {"summary.txt", "rows.jsonl", "overhead.png", "bench.log"} <= files
    assert len(files) <= 8
    results = {line.split()[0]: line.split()[1] for line in (tmp_path / "summary.txt").read_text().splitlines()}
    assert [results.pop(name) for name in ("peers", "sanitizer", "csrc")] == ["absent:", "skipped:", "skipped:"]
    steps = "install env check tests bench serving bottleneck prompts experts mlp dora quantised selective plot".split()
    if importlib.util.find_spec("bitsandbytes") is None:
        assert results.pop(steps.pop(steps.index("quantised"))) == "skipped:"
    assert results == dict.fromkeys(steps, "ok")
    assert "site/fastpeft" in (tmp_path / "env.log").read_text(), "it is the installed package that runs"
    assert {json.loads(line)["variant"] for line in (tmp_path / "rows.jsonl").open()} >= {FROZEN, PEER, "ours"}
    assert done.stdout.rstrip().splitlines()[-1].split()[:2] == ["plot", "ok"], "the table comes last"
    ratios = [line for line in done.stdout.splitlines() if "time over the frozen linear's" in line]
    ops = [
        "lora_linear",
        "multi_lora",
        "prompt_gather",
        "prefix_attention",
        "experts",
        "lora_mlp",
        "dora_linear",
        "lora_linear_nf4",
    ]
    ops = ops if "quantised" in steps else ops[:-1]
    assert [line.split(":")[0] for line in ratios] == ops
    assert "ours, rows" in done.stdout


def test_gpu_script_goes_on_after_a_failure_and_says_so(tmp_path):
    done = gpu_script(tmp_path, STEPS="bench check", BENCH_ARGS="--shape nonsense")
    assert done.returncode == 1
    lines = done.stdout.rstrip().splitlines()
    assert lines[-1].split()[:2] == ["bench", "FAILED:"]
    assert lines[-2].split()[:2] == ["check", "ok"]
    assert "expected KxN" in done.stdout


def test_gpu_script_refuses_a_step_that_it_does_not_have(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    done = gpu_script(tmp_path, STEPS="bench chekc")
    assert done.returncode == 2
    assert "STEPS names chekc" in done.stderr
    assert (tmp_path / "rows.jsonl").exists(), "nothing was removed"


RECORDER = """#!/usr/bin/env bash
printf '%s\\0' "$@" >>"$RECORD"
printf '\\036' >>"$RECORD"
[[ "$*" != *"-m pytest"* ]]
"""
SANITIZER = """#!/usr/bin/env bash
echo "$*" >>"${RECORD%/*}/tools"
while [[ $1 != "$PYTHON" ]]; do shift; done
"$@"
"""


def test_gpu_script_asks_for_what_there_is(tmp_path, monkeypatch, capsys):
    """Its steps on a GPU, with a Python that writes down what it is asked for; the tests fail, and all else goes on."""
    for name, text in (("python", RECORDER), ("compute-sanitizer", SANITIZER)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    variables = {"PYTHON": str(tmp_path / "python"), "RECORD": str(tmp_path / "record")}
    environment = {**os.environ, **variables, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", str(ROOT / "bench/gpu.sh"), str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    lines = [line.split() for line in (tmp_path / "out" / "summary.txt").read_text().splitlines()]
    assert done.returncode == 1, done.stdout + done.stderr
    assert [line[0] for line in lines if line[1] == "FAILED:"] == ["tests"]
    steps = (
        "peers install host env csrc sanitizer check tests bench serving bottleneck prompts experts mlp dora quantised"
    )
    assert list(dict.fromkeys(line[0] for line in lines)) == [*steps.split(), "gemm", "decode", "selective", "plot"]

    tools = re.findall("--tool (\\w+)", (tmp_path / "tools").read_text())
    assert tools == ["memcheck"] * 2 + ["synccheck"] * 2 + ["racecheck"] * 2 + ["memcheck"] * 2
    asked = [call.split("\0")[:-1] for call in (tmp_path / "record").read_text().split("\036")]
    assert not any("pip" in call for call in asked), "setuptools of any age, and no pip, are enough"
    (tests,) = (call for call in asked if "pytest" in call)
    files = [word for word in tests if word.startswith("tests/")]
    assert len(files) > 20
    assert all((ROOT / file).exists() for file in files)
    races = [call[call.index("-m") + 1 :] for call in asked if "-m" in call]
    races = [call for call in races if call[0].startswith("bench.bench_")]
    modules = [importlib.import_module(module) for module, *_ in races]  # before a GPU seems to be there
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(harness, "run", lambda cases, *_: ran.append(len(cases)) or ([], []))
    ran = []
    for module, (_, *arguments) in zip(modules, races, strict=True):
        module.main(arguments)
    assert len(ran) == len(races) > 15
    assert all(ran), "every call has cases"
