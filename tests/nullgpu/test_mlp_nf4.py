"""What a Llama-3.1-8B block in NF4 keeps and needs at most, as test_mlp.py has it of a dense one."""

import pytest
import torch

from bench.llama_block import INNER, WIDE
from bench.memory_models import OURS, PEFT
from tests.support.llama_block import APART, BLOCKS, MIB, ROUNDING, assert_launches, kept_and_peak, nf4_base, step_of

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

SCRATCH = WIDE * INNER * 2 / MIB  # of a whole weight in 16 bits; a quarter of it is written out at a time
NF4_BLOCKS = {
    (0.0, torch.bfloat16): {PEFT: (272.4, 440.9), APART: (272.4, 441.0), OURS: (160.4, 252.1)},
    (0.05, torch.bfloat16): {PEFT: (412.4, 552.9), APART: (272.4, 441.0), OURS: (160.4, 252.1)},
    (0.0, torch.float32): {PEFT: (488.9, 624.9), APART: (272.9, 442.0), OURS: (160.9, 255.5)},
    (0.05, torch.float32): {PEFT: (564.9, 812.9), APART: (272.9, 442.0), OURS: (160.9, 254.3)},
}


@pytest.mark.parametrize(("dropout", "adapters"), NF4_BLOCKS, ids=str)
def test_what_a_block_in_nf4_keeps_and_needs(dropout, adapters):
    """What a dense one keeps, and less above its peak than a whole weight written out."""
    for way, (kept, peak) in NF4_BLOCKS[dropout, adapters].items():
        found = kept_and_peak(step_of(way, dropout, adapters, nf4_base))
        assert found[0] == kept, way
        assert abs(found[1] - peak) <= 2 * ROUNDING, way  # two such blocks
    assert kept == BLOCKS[dropout, adapters][OURS][0]
    assert peak < BLOCKS[dropout, adapters][OURS][1] + SCRATCH / 2


@pytest.mark.parametrize(("reentrant", "peak"), [(False, 212.0), (True, 270.3)])
def test_what_a_block_in_nf4_under_a_checkpoint_needs(reentrant, peak):
    found = kept_and_peak(step_of(OURS, 0.05, torch.float32, nf4_base, reentrant))
    assert abs(found[1] - peak) <= 2 * ROUNDING


@pytest.mark.parametrize("adapters", [torch.bfloat16, torch.float32], ids=str)
def test_launches_of_a_block_in_nf4(adapters):
    """Four parts at this size; nothing waits, and every call is planned."""
    assert_launches(step_of(OURS, 0.0, adapters, nf4_base), 153)
