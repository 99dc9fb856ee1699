"""PEFT's own tests with our layers in place of theirs, each fused call compared with PEFT's layer: a part.

All of them, both ways, by `make peft-suite`. The sources lie in the environment: make .venv/peft-suite.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).parent / "peer_suites" / "run.py"
OVERLAY = Path(sys.prefix, "peft-suite")
PART = "(MLP-LoraConfig and forward_output) or repr_lora or module_type"


def run(*arguments):
    if not (OVERLAY / "source").is_dir():
        pytest.skip("PEFT's source tree is not there: make .venv/peft-suite")
    command = [sys.executable, str(RUN), "peft", str(OVERLAY / "source"), *arguments]
    env = dict(os.environ, PYTHONPATH=str(OVERLAY))
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("mode", [pytest.param("register", marks=pytest.mark.thorough), "accelerate"])
def test_a_part_notices_five_per_cent(mode):
    """Nearly every comparison of these tests sees that our low-rank term is too large."""
    text = run("--self-test", "--mode", mode, "-n", "0", "-k", PART, "--tests", "tests/test_custom_models.py")
    assert int(re.search(r"of (\d+) comparisons noticed", text)[1]) > 0


@pytest.mark.slow
def test_a_part_ends_as_without_us():
    """The name of the class in repr and in the status of layers among them."""
    tests = ("--tests", "tests/test_custom_models.py", "tests/test_tuners_utils.py")
    text = run("--mode", "accelerate", "-n", "0", "-k", PART, *tests)
    assert int(re.search(r"(\d+) compared\n", text)[1]) > 0
