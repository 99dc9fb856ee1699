"""The benchmark harness: no number for a wrong variant, interleaving, cold sets, complete rows, saved bytes."""

import json
import signal
import time
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from bench import bench_lora_linear, clock, harness, lora, plot, report
from bench.harness import BOTH, FORWARD, FROZEN, PEER

pytestmark = pytest.mark.thorough
CPU = torch.device("cpu")
SMALL = lora.Problem("96x64", 40, torch.float32, 8, 0.25, CPU)
SHARED = replace(SMALL, shape="96x64+32")


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Small calls on two threads wait for each other for milliseconds where the machine has other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def case_of(problem, *names):
    return bench_lora_linear.case(problem).only(names or None)


def with_broken(problem, build, own=True):
    """The frozen linear, and a variant computed by ``build(problem, weights, lora_as, lora_bs)``."""
    case = case_of(problem, FROZEN)
    broken = lora.Provider("broken", build, torch.float32, own=own)
    return replace(case, variants=[*case.variants, broken.variant(problem, partial(lora.Arguments.draw, problem))])


@pytest.fixture(scope="module")
def rows():
    found = []
    for problem in (SMALL, replace(SMALL, dropout=0.0), SHARED):
        found += harness.measure(case_of(problem), rounds=5, limit_s=5.0)
    return found


def wrong_scale(problem, weights, lora_as, lora_bs):
    return lambda x: [F.linear(x, weights[0]) * 1.01 + F.linear(F.linear(x, lora_as[0]), lora_bs[0]) * lora.SCALE]


def dropout_on_the_base(problem, weights, lora_as, lora_bs):
    def forward(x):
        x = F.dropout(x, problem.dropout)
        return [F.linear(x, weights[0]) + F.linear(F.linear(x, lora_as[0]), lora_bs[0]) * lora.SCALE]

    return forward


def no_dropout(problem, weights, lora_as, lora_bs):
    return bench_lora_linear._addmm(replace(problem, dropout=0.0), weights, lora_as, lora_bs)


def detached_adapter(problem, weights, lora_as, lora_bs):
    lost = [a.detach() for a in lora_as]
    return bench_lora_linear._addmm(problem, weights, lost, lora_bs)


def raises(problem, weights, lora_as, lora_bs):
    raise RuntimeError("not on this device\nat all")


@pytest.mark.parametrize(
    ("build", "dropout", "reason"),
    [
        (wrong_scale, 0.0, "times eager's"),
        (dropout_on_the_base, 0.25, "times eager's"),
        (no_dropout, 0.25, "dropped the shares [0.0]"),
        (detached_adapter, 0.25, "not have been used in the graph"),
        (raises, 0.25, "RuntimeError: not on this device"),
    ],
)
def test_a_wrong_variant_gets_no_number(build, dropout, reason):
    rows = harness.measure(with_broken(replace(SMALL, dropout=dropout), build), rounds=1, limit_s=1.0)
    broken, frozen = ([row for row in rows if row["variant"] == name] for name in ("broken", FROZEN))
    assert all(reason in row["refused"] for row in broken)
    assert all(row["median_us"] is None and row["ratio_frozen"] is None for row in broken)
    assert all(row["refused"] is None and row["median_us"] > 0 for row in frozen)
    assert "refused" in report.table(rows)


@pytest.mark.parametrize(("own", "code"), [(True, 1), (False, 0)])
def test_a_refused_variant_of_ours_fails_the_run_a_peer_does_not(own, code, monkeypatch):
    broken = with_broken(SMALL, wrong_scale, own)
    monkeypatch.setattr(bench_lora_linear, "case", lambda *_: broken)
    assert bench_lora_linear.main(["--device", "cpu", "--quick"]) == code


def test_every_provider_passes_the_gate_and_is_timed(rows):
    assert {row["refused"] for row in rows} == {None}
    names = {row["variant"] for row in rows}
    assert {FROZEN, PEER, "ours", "addmm form", "ours, separate calls"} <= names
    assert all(0 < row["p20_us"] <= row["median_us"] <= row["p80_us"] for row in rows)


def test_rows_have_every_column_and_survive_json(tmp_path):
    out = tmp_path / "rows.jsonl"
    harness.run([partial(case_of, SMALL, FROZEN, PEER, "ours")], out, rounds=2, limit_s=1.0)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["variant"], row["pass"]) for row in rows[:2]] == [(FROZEN, FORWARD), (FROZEN, BOTH)]
    assert len(rows) == 6
    columns = """op shape rows dtype rank dropout sets variant own adapter_dtype pass
        median_us p20_us p80_us host_us rounds ratio_frozen ratio_peft bytes flops floor_us
        error_max error_rms saved_bytes peak_bytes refused device capability driver
        torch triton peft python threads commit dirty date""".split()
    assert all(list(row) == columns for row in rows)
    empty = {name for row in rows for name, value in row.items() if value is None}
    assert empty <= {"adapter_dtype", "peak_bytes", "refused", "capability", "driver", "commit", "dirty"}
    harness.run([partial(case_of, SMALL, FROZEN)], out, rounds=2, limit_s=1.0)
    assert len(out.read_text().splitlines()) == 8, "a second run adds its rows"


def test_ratios_are_of_medians(rows):
    of = {(row["variant"], row["pass"]): row for row in rows[: len(rows) // 3] if row["dropout"] == 0.25}
    ours, peer, frozen = (of[name, BOTH]["median_us"] for name in ("ours", PEER, FROZEN))
    assert of["ours", BOTH]["ratio_peft"] == pytest.approx(ours / peer, rel=1e-2)
    assert of["ours", BOTH]["ratio_frozen"] == pytest.approx(ours / frozen, rel=1e-2)


def test_traffic_by_hand():
    m, k, n, r = 40, 96, 64, 8
    assert SMALL.traffic(FORWARD, None) == (4 * (m * k + n * k + m * n), 2 * m * n * k)
    moved, operations = SMALL.traffic(FORWARD, torch.float32)
    assert moved == 4 * (m * k + n * k + m * n + r * (k + n))
    assert operations == 2 * m * n * k + 2 * m * r * (k + n)
    read, written = 2 * m * k + m * n + 2 * n * k + m * n + 2 * r * (k + n), m * n + m * k + r * (k + n)
    moved, operations = SMALL.traffic(BOTH, torch.float32)
    assert moved == 4 * (read - m * n + written)  # read: x, x, dY, W, W, A, A, B, B; written: y, dX, dA, dB
    assert operations == 4 * m * n * k + 6 * m * r * (k + n)


def test_calls_interleave_and_never_reuse_a_set_at_once():
    log = []
    steps = {name: [partial(log.append, (name, i)) for i in range(4)] for name in "abc"}
    times = clock.interleave(steps, CPU, rounds=12, warmup=1)
    timed = log[12:]
    assert all(times[name].rounds == 12 for name in "abc")
    rounds = [tuple(name for name, _ in timed[3 * i : 3 * i + 3]) for i in range(12)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds), "every variant once a round"
    assert len(set(rounds)) > 2, "in changing order"
    assert all(one[1] != two[1] for one, two in pairwise(timed)), "on another set each time"
    again, log = log, []
    steps = {name: [partial(log.append, (name, i)) for i in range(4)] for name in "abc"}
    clock.interleave(steps, CPU, rounds=12, warmup=1)
    assert log == again, "the order is drawn from a fixed seed"


def test_a_slow_run_stops_at_its_limit_but_not_before_five_rounds():
    assert clock.interleave({"a": [lambda: None]}, CPU, rounds=50, limit_s=0.0)["a"].rounds == 5


def test_the_cuda_clock_sleeps_in_front_of_the_call_and_reads_its_events(monkeypatch):
    """With a device made of a list: the order of what is queued, and the times of the events around the call."""
    queue = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = len(queue)
            queue.append("event")

        def elapsed_time(self, end):
            between = queue[self.at : end.at]
            return sum(item / 1e6 for item in between if isinstance(item, int)) + between.count("kernel") * 0.25

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", queue.append, raising=False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: queue.append("synchronize"))
    timer = clock.CudaClock(torch.device("cuda"))
    assert timer.cycles_per_us == pytest.approx(1000.0)
    queue.clear()
    device_us, host_us = timer(lambda: queue.append("kernel"), sleep_us=30.0)
    assert queue == ["synchronize", 30_000, "event", "kernel", "event", "synchronize"]
    assert device_us == 250.0, "the sleep is not counted"
    assert 0 < host_us < 1e6
    steps = {name: [partial(queue.append, "kernel")] * 4 for name in "ab"}
    times = clock.interleave(steps, torch.device("cuda"), rounds=6)
    assert [times[name].quantile(0.5) for name in "ab"] == [250.0, 250.0]


def test_a_run_out_of_time_keeps_what_it_has(capsys):
    rows = harness.run([partial(case_of, SMALL, FROZEN)] * 3, None, rounds=1, limit_s=1.0, total_s=-1.0)
    assert rows == ([], [])
    assert "3 of 3 cases not run" in capsys.readouterr().err


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: out of memory\nmore"), KeyboardInterrupt()])
def test_a_case_that_fails_ends_no_other_and_an_interrupt_keeps_what_there_is(error, tmp_path, monkeypatch, capsys):
    def failing():
        raise error

    out, good = tmp_path / "folder" / "rows.jsonl", partial(case_of, SMALL, FROZEN)
    monkeypatch.setattr(bench_lora_linear, "cases", lambda options: [good, failing, good])
    assert bench_lora_linear.main(["--device", "cpu", "--quick", "--out", str(out)]) == 1
    stopped = isinstance(error, KeyboardInterrupt)
    assert len(out.read_text().splitlines()) == (2 if stopped else 4)
    printed = capsys.readouterr().out
    assert "96x64" in printed
    reason = "STOPPED in case 2 of 3" if stopped else "FAILED case 2 of 3: RuntimeError: CUDA error: out of memory"
    assert printed.splitlines()[-1] == reason


def test_a_compilation_that_does_not_end_costs_its_variant_alone():
    def endless(problem, weights, lora_as, lora_bs):
        while True:
            time.sleep(0.01)

    rows = harness.measure(with_broken(SMALL, endless, own=False), rounds=1, limit_s=1.0, gate_s=6.0)
    refused = {row["variant"]: row["refused"] for row in rows}
    assert refused == {FROZEN: None, "broken": "TimeoutError: longer than 6 s"}
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_quantiles():
    times = clock.Times(device=[float(i) for i in range(10, 0, -1)])
    assert (times.quantile(0.2), times.quantile(0.5), times.quantile(0.8)) == (3.0, 6.0, 9.0)


def test_saved_bytes_of_a_known_function():
    x, w = torch.randn(5, 3, requires_grad=True), torch.nn.Parameter(torch.randn(7, 3))
    ones = torch.ones(5, 7)

    def saved(forward):
        return harness.saved_bytes(harness.Call(forward, [x], [ones], [w]))

    assert saved(lambda: [F.linear(x, w)]) == 4 * 5 * 3, "x, but not the parameter"
    assert saved(lambda: [F.linear(x, w.detach())]) == 0, "a frozen layer keeps nothing"
    assert saved(lambda: [F.linear(x, w) + F.linear(x, 2 * w)]) == 4 * (5 * 3 + 7 * 3), "x once, the computed 2 w too"
    assert saved(lambda: [F.linear(x, w).exp()]) == 4 * (5 * 3 + 5 * 7), "exp keeps its result"


def test_saved_bytes_of_lora(rows):
    saved = {(row["shape"], row["dropout"], row["variant"]): row["saved_bytes"] for row in rows}
    m, k, r = SMALL.rows, 96, SMALL.rank
    for dropout in (0.0, 0.25):
        assert saved["96x64", dropout, "ours"] == 4 * (m * k + m * r) + 8 * (dropout > 0)  # x, S and the seed
        assert saved["96x64", dropout, FROZEN] == 0
    assert saved["96x64", 0.25, "ours"] <= 0.53 * saved["96x64", 0.25, PEER], "PEFT keeps x dropped, and the mask"
    assert saved["96x64+32", 0.25, "ours"] <= 0.6 * saved["96x64+32", 0.25, "ours, separate calls"] + 4 * m * k


def test_the_table_and_the_summary_name_every_variant(rows):
    for text in (report.table(rows), report.summary(rows)):
        assert all(row["variant"] in text for row in rows if row["variant"] != FROZEN)
        assert "96x64+32" in text
    assert len(report.summary(rows).splitlines()) == 2 + 3


def test_plot_draws_and_says_when_there_is_nothing_to_draw(rows, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    file, picture = tmp_path / "rows.jsonl", tmp_path / "rows.png"
    facts = {"device": "a device", "torch": "2", "peft": "0", "commit": "abc"}
    file.write_text("".join(json.dumps({**row, **facts}) + "\n" for row in rows))
    assert plot.main([str(file), str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 10_000
    assert plot.main([str(file), str(tmp_path / "none.png"), "--rank", "3"]) == 1
    assert "no rows" in capsys.readouterr().err
    assert not (tmp_path / "none.png").exists()


def test_bad_arguments_are_refused(capsys):
    with pytest.raises(SystemExit):
        bench_lora_linear.main(["--shape", "768"])
    assert "expected KxN" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert bench_lora_linear.main(["--device", "cuda"]) == 2


def test_report_of_a_file(rows, tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    assert report.main([str(file)]) == 1
    assert "no rows" in capsys.readouterr().out
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert report.main([str(file)]) == 0
    assert capsys.readouterr().out.strip() == report.short(rows)
