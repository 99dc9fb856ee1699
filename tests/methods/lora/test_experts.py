"""attach on a model with experts: they stay frozen, and the report says so."""

import pytest
import torch

import fastpeft
from tests.support.models import IDS, MOE_FAMILIES, build, llama


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_the_report_names_experts_that_stay_frozen(family):
    model = build(family)
    experts = [path for path, module in model.named_modules() if path.endswith("experts") and "shared" not in path]
    before = model(input_ids=IDS).logits
    fastpeft.attach(model, fastpeft.Lora(r=2))
    rows = [row for row in fastpeft.report(model) if row.kind == "experts"]
    assert [row.path for row in rows] == experts
    assert all("which attach leaves frozen" in row.status for row in rows)
    assert "0 of" in str(fastpeft.report(model))
    assert torch.equal(model(input_ids=IDS).logits, before)  # a new adapter is none


def test_a_model_without_experts_has_no_such_row():
    model = fastpeft.attach(llama(), fastpeft.Lora(r=2))
    assert all(row.kind == "LoRA layers" for row in fastpeft.report(model))
