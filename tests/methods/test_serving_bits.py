"""``serving_bits``: a model that trains computes, bit for bit, what a bank serves of its checkpoint."""

import copy

import peft
import pytest
import torch

import fastpeft
from fastpeft.serving import AdapterBank
from tests.support.backends import BACKENDS
from tests.support.models import VOCAB, gpt2, llama, prompts

RANKS = {"r": 6, "alpha": 5, "dropout": 0.0}
DTYPES = [torch.bfloat16, torch.float32]


def drawn(model):
    """Random values in place of B's zeros."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def attached(base, **settings):
    return drawn(fastpeft.attach(copy.deepcopy(base), fastpeft.Lora(**{**RANKS, **settings})))


def accelerated(base, **settings):
    config = peft.LoraConfig(**{"r": 6, "lora_alpha": 5, "target_modules": "all-linear", **settings})
    return drawn(fastpeft.accelerate(peft.get_peft_model(copy.deepcopy(base), config)))


def served(base, model, folder, names, ids, others=()):
    """The logits of a bank on ``base`` with the model's adapter, and with other adapters in the same batch."""
    fastpeft.save(model, folder / "own") if not hasattr(model, "peft_config") else model.save_pretrained(folder / "own")
    bank = AdapterBank(copy.deepcopy(base), slots=4, max_rank=64)
    bank.load("own", folder / "own")
    for seed, name in enumerate(others):
        other = attached(base, r=4 + 7 * seed)
        fastpeft.save(other, folder / name)
        bank.load(name, folder / name)
    with torch.no_grad(), bank.use(names):
        return bank.model(ids).logits


@pytest.mark.parametrize("make", [attached, accelerated])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_are_those_of_the_bank_bit_for_bit(tmp_path, make, dtype):
    """The parameters are float32, as trainers keep them; the bank has them in the model's dtype."""
    base, ids = llama().to(dtype), prompts(3, 40)
    model = make(base)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    usual = model(ids).logits
    with fastpeft.serving_bits(model):
        found = model(ids).logits
    expected = served(base, model, tmp_path, ["own"] * 3, ids)
    assert torch.equal(found, expected)
    assert torch.equal(model(ids).logits, usual)
    if dtype == torch.bfloat16:
        assert not torch.equal(usual, expected), "the test could not fail"


def test_other_tenants_in_the_batch_change_no_bit(tmp_path):
    base, ids = llama().to(torch.bfloat16), prompts(4, 40)
    model = attached(base)
    with fastpeft.serving_bits(model):
        found = model(ids).logits
    expected = served(base, model, tmp_path, ["own", "other", None, "own"], ids, others=["other", "third"])
    assert torch.equal(found[[0, 3]], expected[[0, 3]])
    assert not torch.equal(found[1], expected[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [1, 37, 600])
def test_a_layer_has_the_bits_of_multi_lora_on_every_backend(monkeypatch, backend, rows):
    """Also of steps of at most 512 rows, by which longer batches are served."""
    monkeypatch.setenv("FASTPEFT_BACKEND", backend)
    torch.manual_seed(0)
    base = torch.nn.Linear(96, 80)
    layer = drawn(fastpeft.attach(torch.nn.Sequential(copy.deepcopy(base)), fastpeft.Lora(r=5, alpha=3)))
    x = torch.randn(rows, 96)
    with fastpeft.serving_bits(layer, max_rank=16), torch.no_grad():
        found = layer(x)
    adapter = layer[0].adapters["default"]
    a, b = torch.full((3, 16, 96), torch.nan), torch.full((3, 80, 16), torch.nan)
    rank = fastpeft.nn.slot_rank.slot_rank(5, 16, True)
    a[2, :rank], b[2, :, :rank] = 0.0, 0.0
    a[2, :5], b[2, :, :5] = adapter.lora_A.detach(), adapter.lora_B.detach()
    scales, ranks = torch.tensor([9.0, 9.0, 3 / 5]), torch.tensor([16, 16, rank], dtype=torch.int32)
    y = base(x).detach()
    for part in torch.arange(rows).split(512):
        piece = y[part].contiguous()
        slots = torch.full((len(part),), 2, dtype=torch.int32)
        fastpeft.ops.multi_lora_(piece, x[part], a, b, slots, scales, ranks)
        assert torch.equal(piece, found[part])


def test_gradients_are_those_of_the_usual_layer_to_within_rounding():
    base, ids = llama().double(), prompts(2, 9)
    grads = []
    for bits in (False, True):
        model = attached(base, dtype=torch.float64)
        if bits:
            with fastpeft.serving_bits(model):
                model(ids, labels=ids).loss.backward()
        else:
            model(ids, labels=ids).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert len(grads[0]) == 28
    for usual, own in zip(*grads, strict=True):
        torch.testing.assert_close(own, usual, rtol=1e-9, atol=1e-12)


def test_dropout_draws_in_training_and_not_in_evaluation():
    model, ids = attached(llama(), dropout=0.5), prompts(2, 9)
    with fastpeft.serving_bits(model):
        still = model(ids).logits
        assert torch.equal(model(ids).logits, still)
        model.train()
        torch.manual_seed(0)
        first = model(ids).logits
        assert not torch.equal(first, still)
        assert not torch.equal(model(ids).logits, first)
        torch.manual_seed(0)
        assert torch.equal(model(ids).logits, first)


def test_a_disabled_adapter_is_the_base(tmp_path):
    """As trainers ask for the reference policy."""
    base, ids = llama(), prompts(2, 9)
    for model in (attached(base), accelerated(base)):
        disable = model.disable_adapter() if hasattr(model, "peft_config") else fastpeft.disable_adapter(model)
        with fastpeft.serving_bits(model), disable:
            assert torch.equal(model(ids).logits, base(ids).logits)


def several(base):
    model = attached(base)
    fastpeft.attach(model, fastpeft.Lora(**RANKS), "other")
    fastpeft.set_adapter(model, ["default", "other"])
    return model


def merged(base):
    model = accelerated(base)
    model.merge_adapter()
    return model


def replaced(base):
    model = attached(base)
    layer = model.model.layers[1].mlp.up_proj
    layer.forward = type(layer).forward.__get__(layer)
    return model


REFUSED = {
    "no LoRA": (lambda base: base, "LlamaForCausalLM has no fused LoRA layer"),
    "several": (several, "2 active adapters"),
    "a bias": (lambda base: attached(base, lora_bias=True), "has a trained bias"),
    "a rank": (lambda base: attached(base, r=65), "rank 65, expected at most max_rank=64"),
    "an embedding": (lambda base: attached(base, targets=["embed_tokens"]), "embed_tokens: "),
    "PEFT's embedding": (lambda base: accelerated(base, target_modules=["embed_tokens"]), "embed_tokens: it is an em"),
    "merged": (merged, "its adapters are merged"),
    "a forward of its own": (replaced, "has its forward overridden on the instance"),
}


@pytest.mark.parametrize(("make", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_no_bank_serves_so_is_refused_and_nothing_changed(make, reason):
    model = make(llama())
    before = {name: module.__dict__.get("forward") for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=reason), fastpeft.serving_bits(model):
        pytest.fail("entered")
    assert {name: module.__dict__.get("forward") for name, module in model.named_modules()} == before


def test_a_layer_that_changes_inside_raises_where_it_is_called():
    model = attached(llama())
    with fastpeft.serving_bits(model):
        fastpeft.attach(model, fastpeft.Lora(**RANKS), "other")
        fastpeft.set_adapter(model, ["default", "other"])
        with pytest.raises(ValueError, match="2 active adapters"):
            model(prompts(1, 3))


def test_conv1d_says_why_it_is_not_served():
    with pytest.raises(ValueError, match="Conv1D"), fastpeft.serving_bits(attached(gpt2())):
        pytest.fail("entered")


def test_checkpointing_recomputes_the_same(tmp_path):
    """Backward inside the context: the gradients are those without checkpointing, bit for bit."""
    ids, grads = prompts(2, 9) % VOCAB, []
    for checkpointing in (False, True):
        model = attached(llama().to(torch.bfloat16))
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with fastpeft.serving_bits(model):
            model(ids, labels=ids).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
