"""Instructions of a block's step, which repeat: what no time that is measured beside other work can hold so tightly."""

import json
import shutil
import subprocess
import sys

import pytest

from bench import nullgpu
from bench.host_cases import OURS, OWN, PEFT
from fastpeft import _host

MOST = {OURS: 0.52, OWN: 0.50}  # of PEFT's


@pytest.mark.skipif(shutil.which("valgrind") is None, reason="Valgrind is not installed")
def test_a_block_takes_half_of_pefts_instructions(tmp_path):
    """Minutes, nearly all of them imports. The numbers are those of the extension."""
    assert nullgpu.is_loaded()
    if _host.load() is None:
        pytest.skip(f"the host extension is {_host.missing()}")
    rows = tmp_path / "rows"
    command = [sys.executable, "-m", "bench.nullgpu", "-m", "bench.host_instructions", "--case", "block"]
    subprocess.run([*command, "--only", "fwd+bwd, dropout 0.0, bfloat16", "--out", str(rows)], check=True)
    found = {row["way"]: row for row in map(json.loads, rows.read_text().splitlines())}
    assert found[PEFT]["instructions"] > found["frozen"]["instructions"] > 100_000
    for way, most in MOST.items():
        assert found[way]["ratio_peft"] < most, way
