"""The benchmark of whole blocks: every way passes the gate, and memory is counted by allocations."""

import pytest
import torch

from bench import bench_block, harness, report
from bench.harness import BOTH, PEER

pytestmark = pytest.mark.thorough
CPU = torch.device("cpu")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_way_passes_the_gate_and_is_timed(checkpointing):
    problem = bench_block.Problem("64x176", 1, 128, checkpointing, CPU)
    rows = {row["variant"]: row for row in harness.measure(bench_block.case(problem), rounds=2, limit_s=1.0)}
    assert list(rows) == list(bench_block.WAYS)
    assert all(row["refused"] is None and row["pass"] == BOTH and row["median_us"] > 0 for row in rows.values())
    assert "ours" in report.short([*rows.values()])
    kept, peak = ({way: row[name] for way, row in rows.items()} for name in ("saved_bytes", "peak_bytes"))
    assert peak["ours"] < peak[bench_block.MIXED] < peak[PEER]
    assert all(kept[way] < peak[way] for way in rows)
    if checkpointing:
        assert peak["ours"] <= 0.8 * peak[PEER]
        assert max(kept.values()) < peak["ours"]


def test_memory_is_that_of_the_allocations():
    x = torch.ones(1 << 16, requires_grad=True)
    call = harness.Call(lambda: [x.sin().cos()], [x], [torch.ones_like(x)])
    kept, peak = bench_block.Step(*vars(call).values(), trains=call).memory(CPU)
    size = x.nbytes
    assert 2 * size <= kept < 2.1 * size  # what cos keeps, and y
    assert 4 * size <= peak < 5.1 * size
