"""The benchmark of what is selected: every variant passes the gate, trains what it says, and a row has its floor."""

import pytest
import torch

from bench import bench_selective, harness, report
from bench.harness import BOTH, FORWARD, FROZEN, PEER

pytestmark = pytest.mark.thorough
CPU = torch.device("cpu")
CASES = {
    "rows": (
        lambda: bench_selective.row_case("40x60", 16, torch.float32, CPU),
        [FROZEN, "whole weight", "ours, rows", "ours, columns"],
    ),
    "tokens": (lambda: bench_selective.token_case(32, CPU, torch.float32, 100, 24), ["whole weight", PEER, "ours"]),
    "blocks": (lambda: bench_selective.block_case(CPU, torch.float32, 64, 4, 8), ["no checkpoints", PEER, "ours"]),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_every_variant_passes_the_gate_and_is_timed(name):
    make, names = CASES[name]
    rows = harness.measure(make(), rounds=2, limit_s=1.0)
    assert list(dict.fromkeys(row["variant"] for row in rows)) == names
    assert {row["refused"] for row in rows} == {None}
    assert {row["pass"] for row in rows} == ({BOTH} if name == "blocks" else {FORWARD, BOTH})
    assert all(0 < row["median_us"] and 0 < row["floor_us"] for row in rows)
    assert "ours" in report.short(rows)


def test_a_step_updates_what_it_trains():
    case = bench_selective.row_case("40x60", 16, torch.float32, CPU)
    for variant in case.variants[1:]:
        call = variant.bind(0)
        before = call.wrt[1].detach().clone()
        grads = call.both()
        assert grads[1].shape == before.shape
        assert not torch.equal(before, call.wrt[1]), variant.name


def test_traffic_by_hand():
    case = bench_selective.row_case("40x60", 16, torch.float32, CPU)
    frozen, whole, rows, _ = (variant.traffic(BOTH) for variant in case.variants)
    assert frozen == (4 * 2 * (16 * 40 + 16 * 60 + 60 * 40), 2 * 2 * 16 * 60 * 40)
    assert whole == (frozen[0] + 4 * (16 * 40 + 8 * 2400), frozen[1] + 2 * 16 * 2400)
    assert rows == (frozen[0] + 4 * (16 * 40 + 8 * 120), frozen[1] + round(0.05 * 2 * 16 * 2400))
