"""AdapterBank: every row's output is its own adapter's, slots are shared fairly, the model is given back as it was."""

import copy

import pytest
import torch
from torch import nn

from fastpeft.serving import AdapterBank, BankError, UnknownAdapter

pytest.importorskip("peft", reason="PEFT is not installed")
from tests.support.lora_checkpoints import SETTINGS, checkpoint, checkpoints, peft_model
from tests.support.models import llama, prompts

NAMES = list(SETTINGS)
MIXED = ["alice", None, "dave", "bob", "carol", "alice", None, "bob"]


def assert_near(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def peft_logits(model, folders, ids, rows):
    return peft_model(model, folders)(ids, adapter_names=[name or "__base__" for name in rows]).logits


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_mixed_batch_equals_pefts(tmp_path, tied):
    """Ranks and alphas by pattern, rsLoRA, embedding and head, untouched layers, base rows: in one batch."""
    model, ids = llama(tied), prompts(len(MIXED))
    folders = checkpoints(model, tmp_path)
    expected = peft_logits(model, folders, ids, MIXED)
    bare = model(ids).logits
    bank = AdapterBank(model, slots=4, max_rank=12)
    for name, folder in folders.items():
        bank.load(name, folder)
    with bank.use(MIXED):
        logits = model(ids).logits
    assert_near(logits, expected)
    assert (logits[[0, 2, 3, 4]] - bare[[0, 2, 3, 4]]).abs().amax((1, 2)).min() > 0.1, "an adapter does nothing"
    base = [i for i, name in enumerate(MIXED) if name is None]
    assert torch.equal(logits[base], bare[base])


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_alone_equals_peft(bank, model, folders, name):
    ids = prompts(3)
    bank_rows = [name] * 3
    bank.close()
    expected = peft_logits(model, folders, ids, bank_rows)
    with AdapterBank(model, slots=1, max_rank=16) as single:
        single.load(name, folders[name])
        with single.use(bank_rows):
            assert_near(model(ids).logits, expected)


@torch.no_grad()
def test_state_dict_source(model, folders):
    """Tensors and PEFT's config object instead of a folder."""
    from peft import PeftConfig
    from safetensors.torch import load_file

    ids = prompts(2)
    with AdapterBank(model, slots=2, max_rank=16) as bank:
        bank.load("folder", folders["carol"])
        tensors = load_file(folders["carol"] / "adapter_model.safetensors")
        bank.load("tensors", tensors, config=PeftConfig.from_pretrained(folders["carol"]))
        for tensor in tensors.values():
            tensor.fill_(float("nan"))  # the bank has copies
        with bank.use(["folder", "tensors"]):
            logits = model(torch.cat([ids[:1], ids[:1]])).logits
    assert torch.equal(logits[0], logits[1])


@torch.no_grad()
def test_conv1d_model(tmp_path):
    """transformers' Conv1D, whose weight is transposed, and one layer that feeds q, k and v."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0)
    model, ids = GPT2LMHeadModel(config).eval(), prompts(3)
    folder = checkpoint(model, tmp_path / "a", r=4, target_modules=["c_attn", "c_proj", "wte"], fan_in_fan_out=True)
    expected = peft_logits(model, {"a": folder}, ids, ["a", None, "a"])
    bank = AdapterBank(model, slots=2, max_rank=4)
    bank.load("a", folder)
    with bank.use(["a", None, "a"]):
        assert_near(model(ids).logits, expected)


@torch.no_grad()
def test_rows_and_tokens(bank, model):
    """Rows packed side by side, rows repeated in place, and first dimensions that cannot be rows."""
    layer = model.model.layers[0].mlp.down_proj
    x = torch.randn(6, layer.in_features, generator=torch.Generator().manual_seed(0))
    with bank.use(["alice", None, "bob"]):
        pairs = layer(x)
        assert torch.equal(layer(x.view(3, 2, -1)).view(6, -1), pairs)
        assert torch.equal(layer(x.view(6, 1, -1)).view(6, -1), pairs)
        with pytest.raises(ValueError, match=r"use: adapter_names has 3 rows, but a layer received a tensor of \[4\]"):
            layer(x[:4])
    with bank.use(["alice", None, "bob"], lengths=[1, 3, 2]):
        packed = layer(x[None])[0]
        with pytest.raises(ValueError, match=r"received 5 tokens \[5\], expected the 6 of lengths"):
            layer(x[:5])
    with bank.use(["alice"]):
        alice = layer(x)
    with bank.use(["bob"]):
        bob = layer(x)
    bare = layer(x)
    assert_near(packed, torch.cat([alice[:1], bare[1:4], bob[4:]]))
    assert_near(pairs, torch.cat([alice[:2], bare[2:4], bob[4:]]))
    assert torch.equal(packed[1:4], bare[1:4])


@torch.no_grad()
def test_only_base_rows_add_nothing(bank, model, monkeypatch):
    """No call of the op, no routing, and not a bit of difference."""
    from fastpeft import ops

    def forbidden(*_, **__):
        raise AssertionError("work for base rows")

    ids = prompts(2)
    bare = model(ids).logits
    monkeypatch.setattr(ops, "multi_lora_", forbidden)
    monkeypatch.setattr(ops, "route", forbidden)
    with bank.use([None, None]):
        assert torch.equal(model(ids).logits, bare)


def test_one_routing_for_all_layers_and_steps(bank, model, monkeypatch):
    from fastpeft import ops

    calls = []
    route = ops.route
    monkeypatch.setattr(ops, "route", lambda *a, **k: calls.append(a[0].numel()) or route(*a, **k))
    bank.generate(prompts(3), adapter_names=["alice", None, "dave"], max_new_tokens=6, do_sample=False)
    assert calls == [21, 3]


@torch.no_grad()
def test_close_restores_the_model(folders):
    model, ids = llama(), prompts(2)
    before, keys, attributes = copy.deepcopy(model.state_dict()), list(model.state_dict()), dict(vars(model.lm_head))
    bare = model(ids).logits
    bank = AdapterBank(model, slots=2, max_rank=16)
    bank.load("dave", folders["dave"])
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in llama().named_parameters()]
    with pytest.raises(ValueError, match="model has a bank already"):
        AdapterBank(model)
    with bank.use(["dave", None]):
        assert not torch.equal(model(ids).logits, bare)
    bank.close()
    bank.close()
    assert vars(model.lm_head) == attributes
    assert all("forward" not in vars(module) for module in model.modules())
    assert all(torch.equal(model.state_dict()[key], before[key]) for key in keys)
    assert torch.equal(model(ids).logits, bare)
    for call in (lambda: bank.load("x", folders["bob"]), lambda: bank.use(["dave"]).__enter__()):
        with pytest.raises(BankError, match="the bank is closed"):
            call()


@torch.no_grad()
def test_a_copy_has_no_bank(bank, model, folders):
    """A deep copy of an attached model, or a saved one, is the bare model, on weights of its own."""
    import io

    file, ids = io.BytesIO(), prompts(1)
    torch.save(model, file)
    copies = [copy.deepcopy(model), torch.load(io.BytesIO(file.getvalue()), weights_only=False)]
    bare = model(ids).logits
    for other in copies:
        with bank.use(["alice"]):
            assert torch.equal(other(ids).logits, bare)
            alice = model(ids).logits
        assert not torch.equal(alice, bare)
        other.lm_head.weight.zero_()
        assert other(ids).logits.count_nonzero() == 0
        assert torch.equal(model(ids).logits, bare)
        with AdapterBank(other, slots=1, max_rank=16) as second:
            second.load("alice", folders["alice"])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda bank: bank.use("alice").__enter__(),
            TypeError,
            r"use: adapter_names is 'alice' \(str\), expected a list",
        ),
        (lambda bank: bank.use([]).__enter__(), TypeError, "adapter_names is a list of 0"),
        (lambda bank: bank.use(["eve"]).__enter__(), UnknownAdapter, "use: no adapter 'eve', expected one of .* alice"),
        (lambda bank: bank.use([None, 3]).__enter__(), TypeError, r"adapter_names\[1\] is 3 \(int\), expected a name"),
        (
            lambda bank: bank.use(["bob"], lengths=[1, 2]).__enter__(),
            ValueError,
            "lengths is a list of 2, expected a length",
        ),
        (lambda bank: bank.use(["bob"], lengths=[-1]).__enter__(), ValueError, r"lengths\[0\] is -1 \(int\)"),
        (lambda bank: bank.unload("eve"), UnknownAdapter, "unload: no adapter 'eve'"),
        (lambda bank: bank.load("", "x"), ValueError, r"load: name is '' \(str\)"),
        (lambda bank: bank.load("x", 3), TypeError, r"source is 3 \(int\), expected a folder or a state dict"),
        (lambda bank: bank.load("x", {}), TypeError, "config is None"),
        (
            lambda bank: bank.generate(prompts(2), adapter_names=["bob"]),
            ValueError,
            "generate: input_ids is of 2 rows, but adapter_names has 1",
        ),
        (lambda bank: bank.generate(prompts(1), adapter_names="bob"), TypeError, "generate: adapter_names is 'bob'"),
        (lambda bank: bank.generate(prompts(1), adapter_names=["eve"]), UnknownAdapter, "generate: no adapter 'eve'"),
        (lambda bank: AdapterBank(nn.ReLU()), ValueError, "matches no layer of ReLU"),
        (lambda bank: AdapterBank(3), TypeError, r"model is 3 \(int\)"),
        (lambda bank: AdapterBank(nn.Sequential(nn.Linear(2, 2)), slots=0), ValueError, "slots is 0"),
        (lambda bank: AdapterBank(nn.Sequential(nn.Linear(2, 2)), dtype=torch.int8), TypeError, "dtype is torch.int8"),
    ],
)
def test_errors_name_what_is_wrong(bank, call, error, message):
    with pytest.raises(error, match=message):
        call(bank)
