"""What is certain of the kernels without a GPU is held: instructions an element, spills, launches. No time is.

bench/static compiles and counts, in a process without TRITON_INTERPRET.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
from bench.static import sass
from bench.static.launches import Other
from bench.static.layer import Layer, added
from bench.static.model import seconds

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import json, math, sys
import torch
from bench.static.layer import Layer, steps
from bench.static.launches import Launch
from bench.static.model import instructions, predict
from bench.static.others import OPS
op, rank, adapters, dropout, branches, rows = json.loads(sys.argv[1])
layer = Layer(rank, getattr(torch, adapters), dropout, rows, branches=branches)
for step, _, launched in OPS.get(op, steps)(layer):
    kernels = [launch for launch in launched if isinstance(launch, Launch)]
    codes = [predict(launch).code for launch in kernels]
    print(json.dumps({
        "step": step, "launches": len(launched), "spills": sum(c.spills + c.stack for c in codes),
        "instructions": sum(map(instructions, kernels)) * 32 / (layer.rows * layer.inputs),
        "programs": [predict(launch).fit * 132 >= math.prod(launch.grid) for launch in kernels],
        "products": [n for c in codes for p in (c.outside, *(l.counts for l in c.loops)) for n in p if "MMA" in n],
    }))
"""
# (rank, adapters, dropout, branches): instructions a thread executes for an element of x, y or dY, at most, by step.
# The counts are today's and a tenth more, for another compiler: whoever needs fewer writes them down here.
BOUNDS = {
    (16, "bfloat16", 0.0, 1): {"down": 5, "up": 7, "up_backward": 10, "dX": 8, "dA": 6},
    (16, "float32", 0.0, 1): {"down": 9, "up": 11, "up_backward": 12, "dX": 11, "dA": 10},
    (16, "float32", 0.1, 1): {"down": 18, "up": 11, "up_backward": 12, "dX": 29, "dA": 22},
    (8, "float32", 0.0, 1): {"down": 9, "up": 11, "up_backward": 12, "dX": 11, "dA": 12},
    (64, "float32", 0.0, 1): {"down": 13, "up": 18, "up_backward": 30, "dX": 18, "dA": 15},
    (16, "float32", 0.1, 3): {"down": 55, "up": 11, "up_backward": 12, "dX": 75, "dA": 65},
}
LAUNCHES = {"down": 2, "up": 1, "up_backward": 2, "dX": 1, "dA": 2}  # with the sums of what was cut into parts
MORE = {("up_backward", 64): 4, ("down", 3): 2, ("dX", 3): 2}  # two passes; the branches' A's are stacked first


# (op, rank or width, adapters, rows): instructions an element of [rows, 4096], and launches, both at most, by step.
OTHERS = {
    ("bottleneck", 256, "float32", 8448): {"forward": (105, 2), "backward": (295, 6)},
    ("bottleneck", 64, "float32", 512): {"forward": (52, 3), "backward": (105, 5)},
    ("multi_lora", 16, "bfloat16", 32): {"shrink": (145, 1), "expand": (350, 1), "backward": (1450, 8)},
    ("multi_lora", 16, "bfloat16", 8192): {"shrink": (5, 1), "expand": (18, 1), "backward": (34, 8)},
    ("multi_lora", 16, "float32", 8192): {"shrink": (12, 1), "expand": (35, 1), "backward": (80, 8)},
    ("row_linear", 16, "bfloat16", 8192): {"rows": (25, 3), "columns": (40, 2)},
}


def rows_of(*case):
    """What the program says of a case, by step."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", PROGRAM, json.dumps(case)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return {row["step"]: row for row in map(json.loads, done.stdout.splitlines())}


@pytest.mark.thorough
@pytest.mark.parametrize("case", OTHERS, ids=str)
def test_hard_counts_of_other_ops(case):
    op, rank, adapters, count = case
    rows = rows_of(op, rank, adapters, 0.0, 1, count)
    assert rows.keys() == OTHERS[case].keys()
    for step, (instructions, launches) in OTHERS[case].items():
        assert rows[step]["spills"] == 0, step
        assert rows[step]["launches"] <= launches, step
        assert rows[step]["instructions"] <= instructions, step
        assert rows[step]["products"], step
        assert not any("TF32" in name for name in rows[step]["products"]), step
    if count == 32:  # tokens of as many adapters: all programs run at once
        assert rows["expand"]["programs"] == [True]


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[] if case == (16, "float32", 0.0, 1) else pytest.mark.thorough) for case in BOUNDS],
    ids=str,
)
def test_hard_counts(case):
    rank, _, _, branches = case
    rows = rows_of("lora_linear", *case, 8192)
    assert rows.keys() == LAUNCHES.keys()
    for step, row in rows.items():
        assert row["spills"] == 0, step
        assert row["launches"] <= MORE.get((step, rank), MORE.get((step, branches), LAUNCHES[step])), step
        assert row["instructions"] <= BOUNDS[case][step], step
        assert row["products"], step  # tensor cores, and none of TF32
        assert not any("TF32" in name for name in row["products"]), step


def test_every_branch_has_its_own_up():
    one = Other("sum", 1 << 20)
    for branches, step, times in ((1, "up", 1), (3, "up", 3), (3, "up_backward", 3), (3, "dX", 1)):
        layer = Layer(branches=branches)
        assert added(layer, [(step, 0.0, [one])]) - added(layer, []) == pytest.approx(times * seconds(one))
    assert added(Layer(branches=3), []) == pytest.approx(3 * added(Layer(), []))


def test_instructions_are_told_apart():
    kinds = {
        "LDG.E.128.CONSTANT": "LDG.128",
        "LDGSTS.E.BYPASS.LTC128B.128": "LDGSTS.128",
        "LDS.U16": "LDS.16",
        "STL.64": "STL",
        "HGMMA.64x16x16.F32.BF16": "HGMMA.64x16x16",
        "HGMMA.64x32x8.F32.TF32": "HGMMA.TF32.64x32x8",
        "HMMA.16816.F32.BF16": "HMMA.16816",
        "IMAD.MOV.U32": "IMAD.cheap",
        "IMAD.WIDE.U32": "IMAD",
        "FFMA.FTZ": "FP32",
        "LOP3.LUT": "ALU",
        "UIADD3": "UNIFORM",
    }
    assert {name: sass.kind(name) for name in kinds} == kinds


def test_loops_are_found():
    """Two loops, one in the other, and the branch to itself that ends a kernel."""
    lines = ["MOV R1, R2 ;", ".L_x_1:", "FADD R0, R0, R1 ;", ".L_x_2:", "LDG.E R3, [R4] ;", "@P0 BRA `(.L_x_2) ;"]
    lines += ["@P1 BRA `(.L_x_1) ;", "EXIT ;", ".L_x_3:", "BRA `(.L_x_3);", "NOP;"]
    text = "\n".join(
        line if line.endswith(":") else f"        /*{16 * i:04x}*/    {line}" for i, line in enumerate(lines)
    )
    names, loops, end = sass.parse(text)
    assert (names[:3], loops, end) == (["MOV", "FADD", "LDG.E"], [(1, 4), (2, 3)], 6)
