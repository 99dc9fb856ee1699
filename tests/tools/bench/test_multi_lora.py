"""The benchmark of mixed batches: who is in the batch, the least traffic, the gate, rows."""

from dataclasses import replace

import pytest
import torch

from bench import bench_multi_lora, engines, harness, report
from bench.harness import FORWARD, FROZEN, PEER
from bench.mixed_batch import POPULARITIES, Mix, Problem, counts

pytestmark = pytest.mark.thorough
SMALL = Problem("96x64", 12, "8", "uniform", torch.float32, torch.device("cpu"))


@pytest.mark.parametrize(
    ("popularity", "wanted"),
    [
        ("identical", [10]),
        ("distinct", [1] * 10),
        ("uniform", [3, 3, 2, 2]),
        ("zipf", [3, 3, 2, 1, 1]),
        ("skewed", [1, 9]),
        ("half base", [2, 2, 1]),
        ("base only", []),
    ],
)
def test_popularities(popularity, wanted):
    assert counts(popularity, 10) == wanted
    mix = Mix.draw(replace(SMALL, tokens=10, popularity=popularity))
    assert [(mix.token_slots == slot).sum().item() for slot in range(len(wanted))] == wanted


@pytest.mark.parametrize("popularity", POPULARITIES)
def test_one_token(popularity):
    assert counts(popularity, 1) in ([1], [])


def test_adapters_in_use_as_punica_counts_them():
    for popularity, wanted in (("zipf", [1, 3, 5, 6, 8, 9, 11, 13]), ("uniform", [1, 2, 3, 4, 6, 8, 12, 16])):
        assert [len(counts(popularity, tokens)) for tokens in (1, 4, 8, 16, 32, 64, 128, 256)] == wanted


def test_traffic_by_hand():
    t, k, n = 12, 96, 64
    assert SMALL.traffic(FORWARD, adapters=False) == (4 * (t * (k + n) + n * k), 2 * t * n * k)
    moved, operations = replace(SMALL, rank="mixed").traffic(FORWARD)  # 4 adapters of 3 tokens
    assert moved == 4 * (t * (k + n) + n * k) + 4 * (8 + 16 + 32 + 64) * (k + n)
    assert operations == 2 * t * n * k + 2 * 3 * (8 + 16 + 32 + 64) * (k + n)


@pytest.mark.parametrize("problem", [SMALL, replace(SMALL, rank="mixed", popularity="half base")])
def test_every_provider_passes_the_gate_and_is_timed(problem):
    rows = harness.measure(bench_multi_lora.case(problem), rounds=2, limit_s=1.0)
    assert [row["variant"] for row in rows] == [FROZEN, PEER, "ours", "gather + bmm"]
    assert {row["refused"] for row in rows} == {None}
    assert {row["pass"] for row in rows} == {FORWARD}
    assert all(0 < row["p20_us"] <= row["median_us"] for row in rows)
    assert "adapters=" in report.table(rows)
    assert problem.popularity in report.summary(rows)


def test_a_provider_that_serves_slot_0_to_all_gets_no_number(monkeypatch):
    def first_slot(mix, site):
        return engines.gather_bmm(replace(mix, token_slots=torch.zeros_like(mix.token_slots)), site)

    monkeypatch.setitem(bench_multi_lora.PROVIDERS, "gather + bmm", bench_multi_lora._added(first_slot))
    rows = harness.measure(bench_multi_lora.case(SMALL, ["gather + bmm"]), rounds=1, limit_s=1.0)
    assert all("times eager's" in row["refused"] for row in rows)


def test_command_line(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    command = ["--device", "cpu", "--quick", "--shape", "96x64", "--tokens", "8", "--out", str(out)]
    assert bench_multi_lora.main(command) == 0
    assert "multi_lora: time over the frozen linear's, fwd" in capsys.readouterr().out
    assert len(out.read_text().splitlines()) == 4
