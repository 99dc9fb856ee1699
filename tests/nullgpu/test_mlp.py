"""What a Llama-3.1-8B block keeps and needs at most, and the whole model under checkpointing.

The numbers are today's: whoever needs less writes them down here, and nobody needs more unnoticed.
"""

import pytest
import torch
import torch.nn.functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from bench.bench_memory import Case, measure
from bench.memory_models import MODELS, OURS, PEFT, adapted
from tests.support.llama_block import (
    BLOCKS,
    CHECKPOINTED,
    MIB,
    ROUNDING,
    ROWS,
    WIDE,
    assert_launches,
    kept_and_peak,
    step_of,
)


@pytest.mark.parametrize(("dropout", "adapters"), BLOCKS, ids=str)
def test_what_a_block_keeps_and_needs(dropout, adapters):
    for way, (kept, peak) in BLOCKS[dropout, adapters].items():
        found = kept_and_peak(step_of(way, dropout, adapters))
        assert found[0] == kept, way
        assert abs(found[1] - peak) <= ROUNDING, way


@pytest.mark.parametrize(("adapters", "launches"), [(torch.bfloat16, 150), (torch.float32, 156)], ids=str)
def test_launches_of_a_block(adapters, launches):
    """Four chunks at this size; nothing waits, and every call is planned."""
    assert_launches(step_of(OURS, 0.0, adapters), launches)


@pytest.mark.parametrize("reentrant", CHECKPOINTED)
def test_what_a_block_under_a_checkpoint_needs(reentrant):
    for way, peak in CHECKPOINTED[reentrant].items():
        found = kept_and_peak(step_of(way, 0.05, torch.float32, reentrant=reentrant))
        assert found[0] == ROWS * WIDE * 2 / MIB, way  # y
        assert abs(found[1] - peak) <= ROUNDING, way


@pytest.mark.parametrize(("reentrant", "launches"), [(False, 233), (True, 239)])
def test_launches_of_a_block_under_a_checkpoint(reentrant, launches):
    """Promise, y and what backward computes again are plans too."""
    assert_launches(step_of(OURS, 0.05, torch.float32, reentrant=reentrant), launches)


@pytest.mark.parametrize(("fused_norms", "theirs", "ours"), [(False, 2.95, 1.71), (True, 2.82, 1.47)])
def test_a_model_under_checkpointing(fused_norms, theirs, ours, monkeypatch):
    """One row of 4,096 tokens through Llama-3.1-8B, above the base.

    Ours is in the backward of a norm where that is transformers', which computes it in float32 by operators of PyTorch.
    """
    if fused_norms:
        monkeypatch.setattr(LlamaRMSNorm, "forward", _rms_norm)
    shape, name = MODELS["Llama-3.1-8B"], "Llama-3.1-8B"
    found = {}
    for way in (PEFT, OURS):
        model = adapted(shape.base(4), shape, way, 0.05, torch.float32, experts=False)
        model.get_input_embeddings().register_forward_hook(lambda module, inputs, y: y.requires_grad_())
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        case = Case(name, way, "float32", 0.05, False, False, True, False, 4096)
        found[way] = min(measure(model, case)["peak_bytes"] for _ in range(2)) / 2**30
        del model
    rest = 28 * ROWS * 2 * WIDE * 2 / 2**30  # what the other blocks keep: each its input
    assert round(found[PEFT] + rest, 2) == theirs
    assert round(found[OURS] + rest, 2) <= ours


def _rms_norm(norm, x):
    return F.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)
