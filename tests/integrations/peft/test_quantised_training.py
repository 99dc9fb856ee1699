"""QLoRA as it is run: Trainer with checkpointing, bfloat16, dropout, a paged optimizer in 8 bits; stopped, resumed."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training

import fastpeft
from tests.support.quantised_models import FORMATS, ids, load

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
BF16 = torch.bfloat16


def with_peft(bits="nf4 nested", family="llama", ours=True, **settings):
    model = prepare_model_for_kbit_training(load(family, bits), use_gradient_checkpointing=False)
    torch.manual_seed(3)
    settings = {"r": 8, "target_modules": "all-linear", "lora_dropout": 0.05, **settings}
    model = get_peft_model(model, LoraConfig(**settings))
    return fastpeft.accelerate(model, strict=True) if ours else model


def attached():
    model = prepare_model_for_kbit_training(load("llama", "nf4 nested"), use_gradient_checkpointing=False)
    torch.manual_seed(3)
    return fastpeft.attach(model, fastpeft.Lora(r=8, targets="all-linear", dropout=0.05))


def trained(make, folder, resume=None, steps=4):
    """The trained parameters and the log of a run over four batches, saved after the second."""
    rows = [{"input_ids": row, "labels": row} for row in ids(8)]
    arguments = transformers.TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=2, save_steps=2, logging_steps=1, learning_rate=1e-2,
        gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}, bf16=True, seed=7,
        optim="paged_adamw_8bit", use_cpu=True, report_to=[], disable_tqdm=True, lr_scheduler_type="constant",
    )  # fmt: skip
    model = make()
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    trainer.train(resume_from_checkpoint=resume)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}, losses


# On a CPU the paged optimizer of bitsandbytes says that it is the same one without pages.
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("make", [with_peft, attached], ids=["accelerate", "attach"])
def test_a_run_is_resumed_exactly(make, tmp_path):
    whole, losses = trained(make, tmp_path / "whole")
    assert losses[-1] < losses[0]
    stopped, _ = trained(make, tmp_path / "stopped", steps=2)
    resumed, again = trained(make, tmp_path / "stopped", resume=str(tmp_path / "stopped" / "checkpoint-2"))
    assert again == losses
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not all(torch.equal(whole[name], stopped[name]) for name in whole)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("bits", FORMATS)
def test_ten_steps_fall_as_with_peft_and_are_read_by_both(bits, family, tmp_path):
    """The curves differ by roundings alone; what one has trained, the other goes on with."""
    curves, models = [], []
    for ours in (False, True):
        model = with_peft(bits, family, ours, lora_dropout=0.0).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for _ in range(10):
            optimizer.zero_grad()
            with torch.autocast("cpu", BF16):
                loss = model(ids(), labels=ids()).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(torch.tensor(losses))
        models.append(model)
    assert curves[0][-1] < curves[0][0] - 0.25
    assert (curves[0] - curves[1]).abs().max() < 0.1 * (curves[0][0] - curves[0][-1])
    for model, other in ((models[0], True), (models[1], False)):
        model.save_pretrained(tmp_path / str(other))
        loaded = PeftModel.from_pretrained(
            prepare_model_for_kbit_training(load(family, bits), use_gradient_checkpointing=False), tmp_path / str(other)
        )
        loaded = (fastpeft.accelerate(loaded, strict=True) if other else loaded).train()
        with torch.no_grad(), torch.autocast("cpu", BF16):
            one, two = model.train()(ids()).logits, loaded(ids()).logits
        assert (one - two).norm() < 8 * torch.finfo(BF16).eps * one.norm()
