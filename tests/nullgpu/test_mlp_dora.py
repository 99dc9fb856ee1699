"""What a Llama-3.1-8B block with DoRA keeps and needs at most, dense and in NF4, as test_mlp.py has it with LoRA.

The numbers are today's: whoever needs less writes them down here, and nobody needs more unnoticed.
"""

import gc

import pytest
import torch

from bench.memory_models import OURS, PEFT
from tests.support.llama_block import APART, ROUNDING, assert_launches, base, kept_and_peak, nf4_base, step_of

BF16, FP32 = torch.bfloat16, torch.float32
# (dropout, adapters): kept and peak in MiB of each way.
DORA = {
    (0.0, BF16): {PEFT: (608.7, 1305.0), APART: (440.8, 537.2), OURS: (216.8, 291.4)},
    (0.05, BF16): {PEFT: (749.4, 1517.8), APART: (441.5, 570.1), OURS: (328.8, 397.8)},
    (0.0, FP32): {PEFT: (993.4, 2698.1), APART: (441.2, 538.2), OURS: (217.2, 292.4)},
    (0.05, FP32): {PEFT: (2069.4, 3646.1), APART: (442.0, 571.1), OURS: (329.2, 399.0)},
}
IN_NF4 = {
    (0.0, BF16): {PEFT: (608.7, 1417.0), APART: (440.8, 625.3), OURS: (216.8, 327.5)},
    (0.05, BF16): {PEFT: (1165.4, 1933.8), APART: (440.8, 681.3), OURS: (328.8, 470.7)},
    (0.0, FP32): {PEFT: (993.4, 2698.1), APART: (442.0, 627.1), OURS: (217.2, 328.8)},
    (0.05, FP32): {PEFT: (2069.4, 3646.1), APART: (441.2, 682.3), OURS: (329.2, 470.2)},
}


def assert_no_more(table, dropout, adapters, block):
    for way, (kept, peak) in table[dropout, adapters].items():
        step = step_of(way, dropout, adapters, block, dora=True)
        gc.collect()  # what the model before left behind would go in the midst of a step
        found = kept_and_peak(step)
        if way == PEFT:  # what its transposes and copies leave behind is the allocator's, a tenth at most
            assert found[0] == pytest.approx(kept, rel=0.1), way
            assert found[1] == pytest.approx(peak, rel=0.1), way
        else:
            assert abs(found[0] - kept) <= ROUNDING, way
            assert abs(found[1] - peak) <= 2 * ROUNDING, way


@pytest.mark.parametrize(("dropout", "adapters"), DORA, ids=str)
def test_what_a_block_with_dora_keeps_and_needs(dropout, adapters):
    """Half of what layers keep, and with dropout, where gate and up are kept beside u, three quarters."""
    assert_no_more(DORA, dropout, adapters, base)


@pytest.mark.parametrize(("dropout", "adapters"), IN_NF4, ids=str)
def test_what_a_block_in_nf4_with_dora_keeps_and_needs(dropout, adapters):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    assert_no_more(IN_NF4, dropout, adapters, nf4_base)


@pytest.mark.parametrize(("dropout", "launches"), [(0.0, 374), (0.05, 455)])
def test_launches_of_a_block_with_dora(dropout, launches):
    """Nothing waits, and every call is planned."""
    assert_launches(step_of(OURS, dropout, FP32, base, dora=True), launches)
