"""The benchmark of prompts and prefixes: who is in the batch, the least traffic, the gate, rows."""

from dataclasses import replace

import pytest
import torch

from bench import bench_prompt, harness, report
from bench.bench_prompt import MIXES, Problem
from bench.harness import BOTH, FORWARD, FROZEN, PEER

pytestmark = pytest.mark.thorough
GATHER = Problem("prompt_gather", "12x48", 9, "tenants", torch.float32, torch.device("cpu"))
PREFIX = Problem("prefix_attention", "24x4x32", 6, "one prompt", torch.float32, torch.device("cpu"))


def test_traffic_by_hand():
    one = replace(GATHER, adapters=MIXES[0])
    t, d, b, p = 12, 48, 9, 20
    assert one.traffic(FORWARD, frozen=True) == (b * (2 * t * d * 4 + 8 * t), 0)
    forward = 4 * b * t * d + 4 * b * (t + p) * d + 8 * b * (2 * t + 3 * (t + p)) + 4 * p * d
    assert one.traffic(FORWARD) == (forward, 0)
    assert one.traffic(BOTH) == (forward + 4 * b * p * d + 4 * p * d, 0)
    t, h, d, b = 24, 4, 32, 6
    assert PREFIX.traffic(FORWARD) == (4 * b * h * d * 4 * t + 2 * 4 * h * d * 20, 4 * b * h * t * (12 + 20) * d)


def test_every_tenant_is_in_the_batch():
    assert set(GATHER.prompt_ids) == {-1, 0, 1, 2, 3, 4, 5, 6}
    assert GATHER.lengths == (8, 16, 24, 32, 40, 48, 56)


@pytest.mark.parametrize(
    "problem", [GATHER, replace(GATHER, adapters=MIXES[0]), PREFIX], ids=lambda p: p.op + p.adapters
)
def test_every_provider_passes_the_gate_and_is_timed(problem):
    rows = harness.measure(bench_prompt.case(problem), rounds=2, limit_s=1.0)
    names = dict.fromkeys(row["variant"] for row in rows)
    peer = [PEER] if problem.adapters == MIXES[0] else []
    wanted = [FROZEN, *peer, "ours"] + (["eager", "index form"] if problem is not PREFIX else [])
    assert list(names) == wanted
    assert {row["refused"] for row in rows} == {None}
    assert all(0 < row["p20_us"] <= row["median_us"] for row in rows)
    assert problem.shape in report.table(rows)
    saved = {row["variant"]: row["saved_bytes"] for row in rows}
    if problem is PREFIX:
        assert saved["ours"] < saved[PEER]


def test_a_wrong_provider_gets_no_number(monkeypatch):
    right = bench_prompt.prompt_gather

    def wrong(prompts, ids, *args, **options):
        return right(prompts, [0] * len(ids), *args, **options)

    monkeypatch.setattr(bench_prompt, "prompt_gather", wrong)
    rows = harness.measure(bench_prompt.case(GATHER).only(["ours"]), rounds=2, limit_s=1.0)
    assert all(row["refused"] and row["median_us"] is None for row in rows)


def test_command_line(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    assert bench_prompt.main(["--device", "cpu", "--quick", "--gate-only", "--no-compile", "--out", str(out)]) == 0
    assert len(out.read_text().splitlines()) == 2 * (5 + 3)
    assert "prefix_attention" in capsys.readouterr().out
