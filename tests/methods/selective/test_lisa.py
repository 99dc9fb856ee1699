"""LisaSchedule: the blocks that train change, all of them get their turn, and a resumed run draws the same."""

import pytest
import torch

import fastpeft
from tests.support.selections import IDS, changed, llama, loss_of, state

PREFIX = "model.layers."


def run(model, schedule, optimizer, steps):
    moved = []
    for _ in range(steps):
        before = state(model)
        schedule.step(optimizer)
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()
        moved.append({name.removeprefix(PREFIX).split(".")[0] for name in changed(model, before)})
    return moved


def test_only_active_blocks_and_the_head_train():
    model = llama()
    schedule = fastpeft.LisaSchedule(model, n_active=2, every=3, seed=1)
    optimizer = torch.optim.AdamW(schedule.parameters(), lr=1e-2, weight_decay=0.1)
    moved = run(model, schedule, optimizer, 9)
    drawn = [schedule.drawn(step) for step in range(9)]
    assert drawn[0] == drawn[2] != drawn[3] == drawn[5]
    for found, blocks in zip(moved, drawn, strict=True):
        assert found == {"lm_head", *map(str, blocks)}


@pytest.mark.parametrize("keep", [False, True])
def test_the_state_of_resting_blocks(keep):
    model = llama()
    schedule = fastpeft.LisaSchedule(model, n_active=1, every=1, keep_state=keep)
    optimizer = torch.optim.AdamW(schedule.parameters(), lr=1e-2)
    run(model, schedule, optimizer, 6)
    with_state = [i for i, block in enumerate(schedule.blocks) if any(p in optimizer.state for p in block)]
    drawn = {schedule.drawn(step)[0] for step in range(6)}
    assert set(with_state) == (drawn if keep else {schedule.drawn(5)[0]})
    assert len(drawn) > 1


def test_every_block_gets_its_turn_and_resuming_draws_the_same():
    schedule = fastpeft.LisaSchedule(llama(), n_active=2, every=5)
    steps = [schedule.step() for _ in range(200)]
    counts = [sum(i in active for active in steps) for i in range(6)]
    assert min(counts) > 0
    resumed = fastpeft.LisaSchedule(llama(), n_active=2, every=5)
    other = fastpeft.LisaSchedule(llama(), n_active=2, every=5)
    for _ in range(123):
        other.step()
    resumed.load_state_dict(other.state_dict())
    assert [resumed.step() for _ in range(77)] == steps[123:]
    assert [fastpeft.LisaSchedule(llama(), seed=9).drawn(20 * i) for i in range(20)] != [
        steps[5 * i] for i in range(20)
    ]


def test_backward_ends_at_the_lowest_active_block():
    model = llama()
    schedule = fastpeft.LisaSchedule(model, n_active=1, every=1)
    lowest = schedule.step()[0]
    inputs = []
    model.model.layers[lowest].register_forward_hook(lambda m, args, out: inputs.append(args[0]))
    loss_of(model).backward()
    assert not inputs[0].requires_grad


def test_blocks_of_a_selection_rotate_and_the_rest_always_trains():
    model = llama()
    before = state(model)
    selection = fastpeft.select(model, params="norm")
    schedule = fastpeft.LisaSchedule(selection, n_active=1, every=1)
    optimizer = torch.optim.SGD(schedule.parameters(), lr=1.0)
    for found, step in zip(run(model, schedule, optimizer, 3), range(3), strict=True):
        assert found == {"model", str(schedule.drawn(step)[0])}  # model.norm
    schedule.close()
    selection.revert()
    assert changed(model, before) == set()


def test_only_blocks_with_something_to_train_are_drawn():
    selection = fastpeft.select(llama(), layers="last:2", modules=["lm_head"])
    with pytest.raises(ValueError, match="n_active is 3, expected at most 2 blocks"):
        fastpeft.LisaSchedule(selection, n_active=3)
    schedule = fastpeft.LisaSchedule(selection, n_active=1)
    assert [id(p) for p in schedule.always] == [id(selection.model.lm_head.weight)]
    assert {id(p) for p in schedule.parameters()} == {id(p) for p in selection.parameters()}


def test_a_block_that_comes_to_rest_keeps_no_gradient():
    """An optimizer would go on updating it, with the gradient of its last step."""
    model = llama()
    schedule = fastpeft.LisaSchedule(model, n_active=1, every=1)
    last = next(step for step in range(20) if schedule.drawn(step) != schedule.drawn(step + 1))
    schedule.load_state_dict({"steps": last})
    (resting,) = schedule.step()
    loss_of(model).backward()
    assert all(p.grad is not None for p in schedule.blocks[resting])
    schedule.step()
    assert all(p.grad is None for p in schedule.blocks[resting])
    assert model.lm_head.weight.grad is not None


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize("head", [False, True])
def test_the_ends_that_always_train(tied, embeddings, head):
    model = llama(layers=2, tied=tied)
    schedule = fastpeft.LisaSchedule(model, n_active=1, train_embeddings=embeddings, train_head=head)
    wanted = {id(model.model.embed_tokens.weight)} if embeddings else set()
    wanted |= {id(model.lm_head.weight)} if head else set()
    assert sorted(map(id, schedule.always)) == sorted(wanted)  # tied, they are one


def test_as_a_callback_of_the_trainer(tmp_path):
    """The Trainer builds its optimizer before the first step, and resumes from its own count of steps."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    data = [{"input_ids": row, "labels": row} for row in IDS] * 8

    def trained(folder, resume=None):
        model = llama()
        schedule = fastpeft.LisaSchedule(model, n_active=2, every=2, keep_state=True)
        arguments = transformers.TrainingArguments(
            output_dir=str(folder), max_steps=6, save_steps=3, per_device_train_batch_size=2, learning_rate=1e-2,
            report_to=[], disable_tqdm=True, use_cpu=True, lr_scheduler_type="constant",
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, train_dataset=data, callbacks=[schedule])
        trainer.train(resume_from_checkpoint=resume)
        return model, schedule

    once, schedule = trained(tmp_path)
    drawn = {block for step in range(6) for block in schedule.drawn(step)}
    moved = {name.removeprefix(PREFIX).split(".")[0] for name in changed(once, state(llama()))}
    assert moved == {"lm_head", *map(str, drawn)}
    again, other = trained(tmp_path / "b", str(tmp_path / "checkpoint-3"))
    assert other.active == schedule.active
    assert changed(again, state(once)) == set()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"n_active": 7}, ValueError, "n_active is 7, expected at most 6 blocks"),
        ({"n_active": 0}, ValueError, "n_active is 0"),
        ({"every": 0.5}, ValueError, "every is 0.5"),
        ({"blocks": "model.x"}, ValueError, "blocks is 'model.x'"),
        ({"model": 3}, TypeError, "model is int"),
    ],
)
def test_bad_calls(arguments, error, message):
    model = llama()
    with pytest.raises(error, match=f"LisaSchedule: {message}"):
        fastpeft.LisaSchedule(**({"model": model} | arguments))
    assert all(p.requires_grad for p in model.parameters())


def test_a_selected_model_is_given_as_its_selection():
    model = llama()
    selection = fastpeft.select(model, layers="last:2")
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match="LisaSchedule: model has a selection, expected that Selection"):
        fastpeft.LisaSchedule(model, n_active=1)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert len(fastpeft.LisaSchedule(selection, n_active=1).blocks) == 2


def test_close_gives_the_flags_back():
    model = llama()
    model.lm_head.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    schedule = fastpeft.LisaSchedule(model)
    schedule.step()
    schedule.close()
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not any(m._forward_pre_hooks for m in model.modules())
