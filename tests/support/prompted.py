"""Models with prompts, and rows of them by themselves."""

import pytest
import torch

import fastpeft
from fastpeft import PromptTuning, attach
from tests.support.models import gpt2, llama, prompts

peft = pytest.importorskip("peft", reason="PEFT is not installed")


CAUSAL = {"llama": llama, "gpt2": gpt2}


each_causal = pytest.mark.parametrize("family", CAUSAL)


def with_prompts(model, **lengths):
    """Adapters that differ, all of them active ones' equals in size."""
    torch.manual_seed(1)
    for name, length in lengths.items():
        attach(model, PromptTuning(length=length, init="vocabulary"), name=name)
    return model


def padded(rows=3):
    """Ids, a mask with padding on the left and a hole, and labels."""
    ids, mask = prompts(rows), torch.ones(rows, 7, dtype=torch.int64)
    mask[0, :3] = 0
    mask[1, 2] = 0
    return ids, mask, torch.where(mask == 1, ids, -100)


def rows_alone(model, ids, mask, rows):
    for i, name in enumerate(rows):
        on = mask[i].nonzero()[:, 0]
        span = slice(int(on[0]), int(on[-1]) + 1)
        with fastpeft.per_row(model, [name]):
            yield i, span, ids[i : i + 1, span], mask[i : i + 1, span]
