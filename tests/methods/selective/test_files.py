"""Selections on disk: only what was trained; PEFT's own files for token rows and norms, both ways; bad files."""

import json
from types import SimpleNamespace

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import fastpeft
from tests.support.selections import IDS, WHAT, changed, llama, loss_of, state, train

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PEFT_TYPES = {"tokens": "TRAINABLE_TOKENS", "norms": "LN_TUNING"}
SAVED_AS = PEFT_TYPES | {"range": "LN_TUNING"}  # of the rest, what PEFT has


def logits(model):
    model.eval()
    with torch.no_grad():
        out = model(input_ids=IDS).logits
    model.train()
    return out


@pytest.mark.parametrize("what", WHAT)
def test_what_is_saved_is_what_is_loaded(what, tmp_path):
    model = llama()
    selection = fastpeft.select(model, **WHAT[what])
    train(model, selection)
    selection.save(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    assert sum(t.numel() for t in tensors.values()) == sum(p.numel() for p in selection.parameters())
    assert json.loads((tmp_path / CONFIG).read_text())["peft_type"] == SAVED_AS.get(what, "FASTPEFT_SELECTIVE")
    other = llama()
    before = state(other)
    loaded = fastpeft.load_selective(other, tmp_path)
    assert torch.equal(logits(other), logits(model))
    assert {n: tuple(p.shape) for n, p in loaded.named_parameters()} == {
        n: tuple(p.shape) for n, p in selection.named_parameters()
    }
    train(other, loaded, 1)  # and training goes on
    loaded.revert()
    assert changed(other, before) == set()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("what", PEFT_TYPES)
def test_peft_reads_ours(what, tied, tmp_path):
    model = llama(tied=tied)
    train(model, fastpeft.select(model, **WHAT[what]))
    model.fastpeft_selection.save(tmp_path)
    theirs = peft.PeftModel.from_pretrained(llama(tied=tied), tmp_path)
    torch.testing.assert_close(logits(theirs), logits(model))
    assert not torch.allclose(logits(theirs), logits(llama(tied=tied)))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("what", PEFT_TYPES)
def test_we_read_pefts(what, tied, tmp_path):
    if what == "tokens":  # in the order in which they were given
        config = peft.TrainableTokensConfig(token_indices=[7, 3], target_modules=["embed_tokens"])
    else:
        config = peft.LNTuningConfig(target_modules=["input_layernorm", "post_attention_layernorm", "norm"])
    theirs = peft.get_peft_model(llama(tied=tied), config)
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=1e-2)
    loss_of(theirs).backward()
    optimizer.step()
    theirs.save_pretrained(tmp_path)
    ours = llama(tied=tied)
    fastpeft.load_selective(ours, tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs))
    assert not torch.allclose(logits(ours), logits(llama(tied=tied)))


def test_token_gradients_are_pefts():
    config = peft.TrainableTokensConfig(token_indices=[3, 7], target_modules=["embed_tokens"])
    for tied in (False, True):
        theirs, ours = peft.get_peft_model(llama(tied=tied), config), llama(tied=tied)
        selection = fastpeft.select(ours, tokens=[3, 7])
        for model in (theirs, ours):
            loss_of(model).backward()
        (wanted,) = (p.grad for n, p in theirs.named_parameters() if p.requires_grad)
        (found,) = (p.grad for p in selection.parameters())
        torch.testing.assert_close(found, wanted)


def test_a_16_bit_model_keeps_its_masters(tmp_path):
    model = llama().bfloat16()
    selection = fastpeft.select(model, rows={"up_proj": [0, 3]}, tokens=[3])
    train(model, selection)
    selection.save(tmp_path)
    assert {t.dtype for t in load_file(tmp_path / WEIGHTS).values()} == {torch.float32}
    other = llama().bfloat16()
    loaded = fastpeft.load_selective(other, tmp_path)
    for one, two in zip(selection.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(one, two)
    assert torch.equal(logits(other), logits(model))


def break_key(tmp_path, tensors):
    name = next(iter(tensors))
    save_file({name + "x": tensors.pop(name), **tensors}, tmp_path / WEIGHTS)


def break_shape(tmp_path, tensors):
    save_file({name: t[:1].clone() for name, t in tensors.items()}, tmp_path / WEIGHTS)


def change_config(**fields):
    def change(tmp_path, tensors):
        path = tmp_path / CONFIG
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (break_key, ValueError, r"another model:\n  missing .*\n  unexpected"),
        (break_shape, ValueError, r"has shape \[1"),
        (lambda p, t: (p / WEIGHTS).write_bytes(b"no"), ValueError, "truncated or no safetensors"),
        (lambda p, t: (p / WEIGHTS).unlink(), FileNotFoundError, f"has no {WEIGHTS}"),
        (lambda p, t: (p / CONFIG).unlink(), FileNotFoundError, f"has no {CONFIG}"),
        (lambda p, t: (p / CONFIG).write_text("[]"), ValueError, "has peft_type=None"),
        (change_config(peft_type="LORA"), ValueError, "has peft_type='LORA', expected FASTPEFT_SELECTIVE"),
        (change_config(surprise=True), ValueError, "has surprise=True, which is not served"),
        (change_config(rows={"model.layers.9.mlp.up_proj": [0]}), ValueError, "which is no linear layer"),
        (change_config(rows=[1]), ValueError, "is no selection"),
    ],
)
def test_bad_files_change_nothing(damage, error, message, tmp_path):
    model = llama()
    fastpeft.select(model, rows={"layers.0.mlp.up_proj": [0, 3]}, params="norm").save(tmp_path)
    damage(tmp_path, load_file(tmp_path / WEIGHTS))
    other = llama()
    before = state(other)
    with pytest.raises(error, match=message):
        fastpeft.load_selective(other, tmp_path)
    assert changed(other, before) == set()
    assert all(p.requires_grad for p in other.parameters())


# among the other methods of attach


def test_attached_beside_lora(tmp_path):
    model = llama()
    before, outputs = state(model), logits(model)
    fastpeft.attach(model, [fastpeft.Lora(r=2, targets=["q_proj"]), fastpeft.Selective(params="norm", tokens=[3])], "a")
    assert torch.equal(logits(model), outputs)
    asked = [p for p in model.parameters() if p.requires_grad]
    assert len(asked) == 6 * 2 + 13 + 1
    optimizer = torch.optim.AdamW(asked, lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    trained = logits(model)
    assert not torch.allclose(trained, outputs)
    with fastpeft.disable_adapter(model):
        assert torch.equal(logits(model), outputs)
    assert torch.equal(logits(model), trained)
    fastpeft.save(model, tmp_path, "a")
    other = llama()
    fastpeft.load(other, tmp_path, "b")
    assert torch.equal(logits(other), trained)
    fastpeft.detach(model)
    assert changed(model, before) == set()
    assert list(model.state_dict()) == list(before)


def test_two_named_selections():
    model = llama()
    outputs = logits(model)
    fastpeft.attach(model, fastpeft.Selective(layers="last:1"), "one")
    fastpeft.attach(model, fastpeft.Selective(params="norm", rows={"up_proj": [0]}), "two")
    found = {}
    for name in ("one", "two"):
        fastpeft.set_adapter(model, name)
        assert torch.equal(logits(model), outputs), "the other's training shows"
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()
        found[name] = logits(model)
        assert not torch.allclose(found[name], outputs)
    fastpeft.set_adapter(model, "one")
    assert torch.equal(logits(model), found["one"])
    with pytest.raises(ValueError, match="'one' and 'two' both train model.layers.5"):
        fastpeft.set_adapter(model, ["one", "two"])
    fastpeft.set_adapter(model, "two")
    assert torch.equal(logits(model), found["two"])
    fastpeft.detach(model)
    assert torch.equal(logits(model), outputs)


def test_selections_that_share_a_weight_cannot_act_together():
    model = llama()
    fastpeft.attach(model, fastpeft.Selective(layers="last:1"), "one")
    fastpeft.attach(model, fastpeft.Selective(rows={"layers.5.mlp.up_proj": [0]}), "two")
    fastpeft.attach(model, fastpeft.Selective(rows={"layers.4.mlp.up_proj": [0]}), "three")
    with pytest.raises(ValueError, match="'one' and 'two' both train model.layers.5.mlp.up_proj.weight"):
        fastpeft.set_adapter(model, ["one", "two"])
    fastpeft.set_adapter(model, ["two", "three"])
    assert sum(p.requires_grad for p in model.parameters()) == 2
    fastpeft.detach(model)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("what", WHAT)
def test_what_select_saved_is_an_adapter_too(what, tmp_path):
    model, other = llama(), llama()
    train(model, fastpeft.select(model, **WHAT[what]))
    model.fastpeft_selection.save(tmp_path)
    fastpeft.load(other, tmp_path)
    assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize("tied", [False, True])
def test_token_rows_inside_pefts_lora_checkpoints(tied, tmp_path):
    """Both ways: PEFT's trainable_token_indices."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, trainable_token_indices=[7, 3])
    theirs = peft.get_peft_model(llama(tied=tied), config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.add_(torch.arange(2.0)[:, None] + 1)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = llama(tied=tied)
    fastpeft.load(ours, tmp_path / "theirs", is_trainable=True)
    torch.testing.assert_close(logits(ours), logits(theirs))
    train(ours, SimpleNamespace(param_groups=lambda lr: [p for p in ours.parameters() if p.requires_grad]))
    fastpeft.save(ours, tmp_path / "ours")
    assert not any(path.is_dir() for path in (tmp_path / "ours").iterdir())
    again = peft.PeftModel.from_pretrained(llama(tied=tied), tmp_path / "ours")
    torch.testing.assert_close(logits(again), logits(ours))
    assert not torch.allclose(logits(ours), logits(theirs))
