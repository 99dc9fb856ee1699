"""Every launch of every kernel, compiled for every architecture: no register spills, fits, uses tensor cores.

tests/support/aot.py does the compiling, in processes without TRITON_INTERPRET.
"""

import importlib.util
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

pytestmark = [pytest.mark.oldest, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
# Bytes of shared memory that a block may ask for (CUDA C++ Programming Guide, "Compute Capabilities").
SHARED = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
FIRST = 90  # the architecture of `make test`; the others are thorough
KERNELS = {
    "lora_linear": {"_down_kernel", "_up_kernel", "_up_backward_kernel", "_outer_kernel", "_sum_kernel"},
    "multi_lora": {"_sort_kernel", "_tile_kernel", "_shrink_kernel", "_expand_kernel", "_outer_kernel"},
    "experts": {"_shrink_kernel", "_expand_kernel", "_outer_kernel", "_combine_kernel", "_sum_kernel"},
    "lora_mlp": {"_gated_kernel", "_gated_backward_kernel"},
    "dora_linear": {"_combined_kernel", "_masked_kernel", "_scaled_kernel", "_gain_kernel", "_sum_kernel"},
    "lora_embedding": {"_embed_kernel", "_down_kernel", "_up_backward_kernel", "_outer_kernel", "_sum_kernel"},
    "dequantise": {"_four_bit_kernel", "_eight_bit_kernel"},
    "row_linear": {"_column_kernel", "_gathered_outer_kernel", "_sum_kernel"},
    "prompt_gather": {"_gather_kernel", "_prompt_backward_kernel", "_source_backward_kernel", "_sum_kernel"},
    "bottleneck": {
        *("_fused_kernel", "_hidden_kernel", "_hidden_up_kernel"),
        *("_hidden_backward_kernel", "_dx_kernel", "_weight_gradient_kernel", "_sum_kernel"),
        "_finish_kernel",
    },
}
# Bytes of stack that a kernel may use: none, but by Triton 3.6, which leaves a few registers there now and then
# (the guarantees say so).
STACK = 16 if importlib.util.find_spec("triton") and version("triton").startswith("3.6.") else 0
SORTING = {"_sort_kernel", "_tile_kernel"}
COPYING = {
    *("_column_kernel", "_finish_kernel"),
    *("_sum_kernel", "_combine_kernel", "_gather_kernel", "_prompt_backward_kernel", "_source_backward_kernel"),
    *("_four_bit_kernel", "_eight_bit_kernel"),
    *("_gated_kernel", "_gated_backward_kernel"),
    *("_masked_kernel", "_scaled_kernel", "_gain_kernel"),
}
PROJECT = {"_down_kernel", "_shrink_kernel", "_fused_kernel", "_hidden_kernel", "_hidden_backward_kernel"}


def compiled(architecture: int, op: str) -> list[dict]:
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.support.aot", "--json", "--arch", str(architecture), "--op", op]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def say(rows: list[dict]) -> str:
    return "\n".join(map(str, rows))


@pytest.mark.parametrize("op", KERNELS)
@pytest.mark.parametrize(
    "architecture",
    [pytest.param(cc, id=f"sm_{cc}", marks=[] if cc == FIRST else pytest.mark.thorough) for cc in SHARED],
)
def test_compiles_without_spills_and_fits(architecture, op):
    rows = compiled(architecture, op)
    assert {row["kernel"] for row in rows} == KERNELS[op]
    spilled = [row for row in rows if row["stack"] > STACK or (row["spills"] and not STACK)]
    assert not spilled, f"{len(spilled)} of {len(rows)} kernels spill registers:\n{say(spilled)}"
    large = [row for row in rows if row["shared"] > SHARED[architecture]]
    assert not large, f"more shared memory than sm_{architecture} has:\n{say(large)}"
    # 16-bit products on tensor cores; 16-bit times float32 as three TF32 terms. Products of float32 are true float32.
    slow = [
        row
        for row in rows
        if "float32" not in row["case"] and row["kernel"] not in SORTING | COPYING and not row["dot"]
    ]
    slow += [row for row in rows if row["kernel"] in PROJECT and row["case"][0] != "float32" and not row["dot"]]
    assert not slow, f"no tensor-core instruction:\n{say(slow)}"
    generation = {90: "wgmma", 100: "tcgen05"}.get(architecture, "mma.sync")
    old = [row for row in rows if row["kernel"] == "_down_kernel" and "float32" not in row["case"]]
    old = [row for row in old if generation not in row["dot"]]
    assert not old, f"not the instruction of its generation, {generation}:\n{say(old)}"
