"""What a step asks of the device is held exactly, its host time beside PEFT's with room for noise.

The numbers are today's: whoever needs fewer writes them down here, and nobody needs more unnoticed. The benchmark's
rows are in bench/results/host.jsonl.
"""

import pytest
import torch

from bench import nullgpu
from bench.bench_host import counts, measure
from bench.host_cases import OURS, OWN, PEFT, Case, steps
from tests.support import host_extension

# (case, trains, dropout, adapters, autocast): launches; device-to-device copies, which sum a shared input's gradients.
LAUNCHES = {
    Case("linear", True, 0.0, "bfloat16"): (10, 0),
    Case("linear", True, 0.1, "bfloat16"): (11, 0),
    Case("linear", True, 0.0, "float32"): (10, 0),
    Case("linear", True, 0.1, "float32"): (11, 0),
    Case("linear", True, 0.1, "float32", autocast=True): (11, 0),
    Case("linear", False, 0.0): (4, 0),
    Case("linear", False, 0.1): (5, 0),
    Case("block", True, 0.0, "bfloat16"): (66, 0),
    Case("block", True, 0.1, "bfloat16"): (75, 0),
    Case("block", True, 0.0, "float32"): (66, 0),
    Case("block", True, 0.1, "float32"): (75, 0),
    Case("block", True, 0.1, "float32", autocast=True): (75, 0),
    Case("block", False, 0.0): (28, 0),
    Case("block", False, 0.1): (39, 0),
    Case("multi_lora"): (3, 0),
    Case("experts", True, 0.0, "bfloat16"): (59, 0),
    Case("experts", True, 0.0, "float32"): (59, 0),
}
# Host time over PEFT's: the committed row's and a third more for a machine with other work.
RATIOS = {
    Case("block", True, 0.0, "bfloat16"): 0.65,
    Case("block", True, 0.1, "float32"): 0.55,
    Case("block", False, 0.0): 0.55,
    Case("experts", True, 0.0, "float32"): 1.1,
}
# The same without the extension, whose form in Python other work of the machine slows more.
WITHOUT = {
    Case("block", True, 0.0, "bfloat16"): 1.2,
    Case("block", True, 0.1, "float32", autocast=True): 1.0,
    Case("block", False, 0.0): 1.2,
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("host", host_extension.WAYS)
@pytest.mark.parametrize("case", LAUNCHES, ids=str)
def test_launches_copies_and_no_waits(case, host):
    found = steps(case)
    for way in {OURS, OWN} & set(found):
        with host_extension.serves(host):
            asked = counts(found[way])
        assert (asked["launches"], asked["copies"]) == LAUNCHES[case], way
        assert (asked["syncs"], asked["pageable"], asked["missing"]) == (0, 0, 0), way


@pytest.mark.parametrize("case", RATIOS, ids=str)
def test_host_time_beside_peft(case):
    found = steps(case)
    rows = measure({way: found[way] for way in (PEFT, OURS)}, rounds=7)
    assert rows[OURS]["ratio_peft"] < RATIOS[case]


@pytest.mark.parametrize("case", WITHOUT, ids=str)
def test_host_time_without_the_extension(case):
    with host_extension.serves("Python"):
        found = steps(case)
        rows = measure({way: found[way] for way in (PEFT, OURS)}, rounds=7)
    assert rows[OURS]["ratio_peft"] < WITHOUT[case]


# launches, synchronisations, copies, pageable copies
SERVED = {"decode step": (440, 1, 2, 1), "Batcher turn": (4, 1, 2, 0)}


@pytest.mark.parametrize("name", SERVED)
def test_what_serving_asks(name):
    with nullgpu.reads_zero():
        asked = counts(steps(Case(name))[OURS])
    assert tuple(asked[column] for column in ("launches", "syncs", "copies", "pageable")) == SERVED[name]


def test_a_step_that_waits_is_seen():
    x = torch.zeros(4, device="cuda")
    assert counts(lambda: x.sum().item())["syncs"] > 0
    assert counts(lambda: torch.ones(4).cuda())["pageable"] == 1
