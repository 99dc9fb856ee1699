"""The benchmark of bottleneck adapters: the least traffic, the gate, the peer's own layer where it is, rows."""

import pytest
import torch

from bench import bench_bottleneck, harness, report
from bench.bench_bottleneck import FORMS, Problem
from bench.harness import BOTH, FORWARD

pytestmark = pytest.mark.thorough
SMALL = Problem(48, 20, "plain", torch.float32, torch.device("cpu"))


def test_traffic_by_hand():
    k, m, h = 48, 20, 3
    assert SMALL.hidden == h
    assert SMALL.traffic(FORWARD) == (4 * (2 * m * k + 2 * k * h), 4 * m * k * h)
    assert SMALL.traffic(BOTH) == (4 * (5 * m * k + 4 * k * h), 14 * m * k * h)


@pytest.mark.parametrize("form", FORMS)
def test_every_provider_passes_the_gate_and_is_timed(form):
    rows = harness.measure(bench_bottleneck.case(Problem(96, 64, form, torch.float32, torch.device("cpu"))), 2, 1.0)
    assert {"ours", "eager"} <= {row["variant"] for row in rows}
    assert {row["refused"] for row in rows} == {None}
    assert all(0 < row["p20_us"] <= row["median_us"] for row in rows)
    assert "of eager's" in report.short(rows) or "of adapters's" in report.short(rows)


def test_a_wrong_provider_gets_no_number(monkeypatch):
    right = bench_bottleneck.bottleneck
    monkeypatch.setattr(bench_bottleneck, "bottleneck", lambda *args, **options: 1.01 * right(*args, **options))
    rows = harness.measure(bench_bottleneck.case(SMALL).only(["ours"]), 2, 1.0)
    assert all(row["refused"] and row["median_us"] is None for row in rows)


def test_command_line(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    assert bench_bottleneck.main(["--device", "cpu", "--quick", "--gate-only", "--no-compile", "--out", str(out)]) == 0
    assert len(out.read_text().splitlines()) >= 2 * 2 * len(FORMS)
    assert "bottleneck" in capsys.readouterr().out
