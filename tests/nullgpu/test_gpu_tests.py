"""What the GPU's tests ask of a GPU is there: they run to their end on the null GPU, whatever the values."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OPS = "lora_linear", "multi_lora", "experts", "bottleneck", "row_linear", "prompt_gather"
GROUPS = {
    "ops": [f"tests/ops/{op}/test_torch.py" for op in OPS],
    "across ops": [
        "tests/ops/test_routing.py",
        "tests/ops/test_second_gradients.py",
        "tests/ops/lora_linear/test_peers.py",
    ],
    "modules": ["tests/methods/prefix/test_attention_kernels.py", "tests/methods/selective/test_row_modules.py"],
    "servers": ["tests/integrations/vllm/test_layers.py", "tests/integrations/sglang/test_layers.py"],
    "csrc": ["tests/cuda/multi_lora/test_op.py", "tests/cuda/lora_linear/test_op.py"],
}


@pytest.mark.parametrize("group", GROUPS)
def test_they_run(group):
    arguments = ["-q", "-p", "no:cacheprovider", "-p", "tests.nullgpu.values_ignored", "-m", "gpu or not slow"]
    command = [sys.executable, "-m", "bench.nullgpu", "-m", "pytest", *arguments, "-k", "not reference"]
    done = subprocess.run([*command, *GROUPS[group]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


BAD = """
import torch

def test_raises():
    torch.zeros(2, device="cuda") + torch.zeros(3, device="cuda")

def test_another_shape():
    assert torch.zeros(2, device="cuda").shape == (3,)

def test_another_value():
    assert torch.equal(torch.zeros(2, device="cuda"), torch.ones(2, device="cuda"))
"""


def test_what_is_no_value_still_counts():
    file = ROOT / "tests" / "nullgpu" / "test_written_here.py"
    file.write_text(BAD)
    try:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tests.nullgpu.values_ignored"]
        done = subprocess.run([*command, str(file)], cwd=ROOT, capture_output=True, text=True)
    finally:
        file.unlink()
    assert "2 failed, 1 passed" in done.stdout, done.stdout
