"""PEFT's checkpoints that carry embedding weights, both ways: adapted, copied, tied, of a resized vocabulary, rows."""

import pytest
import torch

import fastpeft
from tests.support import models
from tests.support.models import close

peft = pytest.importorskip("peft", reason="PEFT is not installed")

# float64 results of two orders of summation over some hundred products, in values of order 1.
ROUNDING = 2**10 * torch.finfo(torch.float64).eps
Lora = peft.LoraConfig


def tied():
    return models.llama(tied=True)


def lora(targets, **settings):
    return lambda: Lora(r=2, target_modules=targets, **settings)


Q, TYING, COPIED, SAVED = ["q_proj"], {"ensure_weight_tying": True}, "modules_to_save", {"save_embedding_layers": True}
ROWS = "trainable_token_indices"
# The model, PEFT's config, the size of the vocabulary or None, and how it is saved.
CASES = {
    "head": (models.llama, lora(["lm_head"]), None, {}),
    "head of a tied model": (tied, lora(["lm_head"]), None, {}),
    "embedding": (models.llama, lora(["embed_tokens", "q_proj"]), None, {}),
    "embedding of a tied model": (tied, lora(["embed_tokens"]), None, {}),
    "T5's shared embeddings": (models.t5, lora(["embed_tokens", "lm_head"]), None, {}),
    "GPT-2's embeddings": (models.gpt2, lora(["wte", "wpe", "c_attn"]), None, {}),
    "BERT's embeddings": (models.bert, lora(["word_embeddings", "query"]), None, {}),
    "kept tied by the embedding": (tied, lora(["embed_tokens"], **TYING), None, {}),
    "kept tied by the head": (tied, lora(["lm_head", "q_proj"], **TYING), None, {}),
    "kept tied by a pattern": (tied, lora(r".*embed_tokens", **TYING), None, {}),
    "copies kept tied": (tied, lora(Q, modules_to_save=["lm_head"], **TYING), None, {}),
    "copies": (models.llama, lora(Q, modules_to_save=["embed_tokens", "lm_head"]), None, {}),
    "a copy and the original": (models.llama, lora(Q, modules_to_save=["embed_tokens"]), None, SAVED),
    "resized": (models.llama, lora(Q), 104, SAVED),
    "resized and adapted": (models.llama, lora(["lm_head", "embed_tokens"]), 104, SAVED),
    "resized and copied": (models.llama, lora(Q, modules_to_save=["lm_head", "embed_tokens"]), 104, {}),
    "resized and tied": (tied, lora(Q), 104, SAVED),
    "resized T5": (models.t5, lora(["q"]), 104, SAVED),
    "resized beside token rows": (models.llama, lora(Q, trainable_token_indices=[1, 5]), 104, SAVED),
    "resized beside norms": (models.llama, lambda: peft.LNTuningConfig(target_modules=["norm"]), 104, SAVED),
    "token rows and embeddings": (models.llama, lora(Q, trainable_token_indices=[5, 1]), None, SAVED),
    "token rows of a tied model": (tied, lora(Q, trainable_token_indices=[5, 1]), None, SAVED),
    "token rows, the head adapted": (models.llama, lora(["lm_head"], trainable_token_indices=[1]), None, {}),
    "rows of the head": (models.llama, lora(Q, trainable_token_indices={"lm_head": [5, 1]}), None, {}),
    "token rows alone": (tied, lambda: peft.TrainableTokensConfig(token_indices=[2, 1]), None, SAVED),
}


def make(build, size):
    model = build()
    if size is not None:
        model.resize_token_embeddings(size, mean_resizing=False)
    return model.eval()


def logits(model):
    model = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    return models.logits(model).detach()


def trained(case, directory):
    """PEFT's model of the case, everything that it trains and the new rows moved, and saved; with its logits."""
    build, config, size, saving = CASES[case]
    torch.manual_seed(3)
    wrapped = peft.get_peft_model(make(build, size), config()).eval()
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape) / 3)
        for table in (wrapped.get_input_embeddings(), wrapped.get_output_embeddings()) if size else ():
            table.weight[-8:].normal_()
    wrapped.save_pretrained(directory, **saving)
    return logits(wrapped)


@pytest.mark.parametrize("case", CASES)
def test_both_ways(case, tmp_path):
    build, _, size, _ = CASES[case]
    expected = trained(case, tmp_path / "theirs")
    torch.manual_seed(9)  # for the rows that a resized model starts with, which are no longer the trained ones
    model = make(build, size)
    plain = logits(model)
    assert not close(plain, expected)
    fastpeft.load(model, tmp_path / "theirs")
    assert close(logits(model), expected)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with fastpeft.disable_adapter(model):
        assert close(logits(model), plain)
    fastpeft.save(model, tmp_path / "ours")
    again = make(build, size)
    assert close(logits(fastpeft.load(again, tmp_path / "ours")), expected)
    if case != "rows of the head":  # which fastpeft.save writes as a selection, a format of its own
        theirs = peft.PeftModel.from_pretrained(make(build, size), tmp_path / "ours").eval()
        assert close(logits(theirs), expected)
    fastpeft.detach(model)
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("case", [case for case, (_, _, size, _) in CASES.items() if size])
def test_another_vocabulary_is_one_sentence(case, tmp_path):
    trained(case, tmp_path)
    model = CASES[case][0]()
    with pytest.raises(
        ValueError, match=r"load: .* \[104, 32\], the model has \[96, 32\]: call model\.resize_token"
    ) as e:
        fastpeft.load(model, tmp_path)
    assert "\n" not in str(e.value)
    assert not hasattr(model, "fastpeft_attachment")


def test_each_adapter_brings_its_own(tmp_path):
    """Two adapters with embeddings, one without: each computes as if alone, in any order; merged too."""
    alone = {"a": trained("resized and tied", tmp_path / "a")}
    model = make(tied, 104)
    plain = logits(model)
    fastpeft.attach(model, fastpeft.Lora(r=2, targets=["v_proj"], init="random"), "plain")
    without = logits(model)
    fastpeft.load(model, tmp_path / "a", "a")
    assert torch.equal(logits(model), without)
    fastpeft.attach(model, fastpeft.Selective(tokens=[100]), "rows")  # reads the model's own rows, whoever is active
    for name in ("a", "plain", "a", "rows", "a"):
        fastpeft.set_adapter(model, name)
        assert close(logits(model), {**alone, "plain": without, "rows": plain}[name])
    fastpeft.delete_adapter(model, "rows")
    fastpeft.merge(model)
    assert close(logits(model), alone["a"])
    with fastpeft.disable_adapter(model):
        assert torch.equal(logits(model), plain)
    assert close(logits(model), alone["a"])
    fastpeft.detach(model)
    assert torch.equal(logits(model), plain)


def test_into_an_adapter_that_is_there(tmp_path):
    """Resumption: the flags stay, the values come, also where the adapter brought none before."""
    expected = trained("resized", tmp_path)
    model = fastpeft.attach(make(models.llama, 104), fastpeft.Lora(r=2, alpha=8, targets=["q_proj"]))
    flags = [parameter.requires_grad for parameter in model.parameters()]
    assert any(flags)
    fastpeft.load(model, tmp_path)
    assert close(logits(model), expected)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags


def test_trainable_as_in_peft(tmp_path):
    """What trains after loading is what PEFT trains, and by default nothing."""
    for case in ("embedding", "copies", "resized", "token rows alone"):
        trained(case, tmp_path / case)
        build, _, size, _ = CASES[case]
        for flag in (False, True):
            ours = fastpeft.load(make(build, size), tmp_path / case, is_trainable=flag)
            theirs = peft.PeftModel.from_pretrained(make(build, size), tmp_path / case, is_trainable=flag)
            counts = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (ours, theirs)]
            assert counts[0] == counts[1], case
            assert bool(counts[0]) == flag


def test_tied_adapters_are_not_trained_apart(tmp_path):
    trained("kept tied by the head", tmp_path)
    with pytest.raises(ValueError, match="ensure_weight_tying would have to keep"):
        fastpeft.load(tied(), tmp_path, is_trainable=True)
    with pytest.raises(ValueError, match="has ensure_weight_tying=True beside model.embed_tokens"):
        fastpeft.attach(tied(), CASES["kept tied by the head"][1]())
    with pytest.raises(ValueError, match="token_indices are others than the embedding's"):
        config = Lora(r=2, target_modules=["q_proj"], trainable_token_indices={"lm_head": [5], "embed_tokens": [2]})
        peft.get_peft_model(tied(), config).save_pretrained(tmp_path / "rows")
        fastpeft.load(tied(), tmp_path / "rows")


def test_gradients_of_an_adapted_embedding_are_pefts():
    """With padding, whose row of A gets none, and with an embedding that scales its rows."""

    class Scaled(torch.nn.Embedding):
        embed_scale = torch.tensor(3.0)

        def forward(self, ids):
            return super().forward(ids) * self.embed_scale

    def build():
        torch.manual_seed(0)
        return torch.nn.Sequential(Scaled(11, 8, padding_idx=0), torch.nn.Linear(8, 3)).double()

    ours = fastpeft.attach(build(), fastpeft.Lora(r=2, alpha=5, targets=["0"], init="random"))
    theirs = peft.get_peft_model(build(), Lora(r=2, lora_alpha=5, target_modules=["0"], init_lora_weights=False))
    layer, adapter = theirs.base_model.model[0], ours[0].adapters["default"]
    with torch.no_grad():
        adapter.lora_A.copy_(layer.lora_embedding_A["default"])
        adapter.lora_B.copy_(layer.lora_embedding_B["default"])
    ids = torch.tensor([[0, 3, 3], [10, 1, 0]])
    for model in (ours, theirs):
        model(ids).square().sum().backward()
    # float64, the same few products.
    torch.testing.assert_close(
        adapter.lora_A.grad, layer.lora_embedding_A["default"].grad, rtol=ROUNDING, atol=ROUNDING
    )
    torch.testing.assert_close(
        adapter.lora_B.grad, layer.lora_embedding_B["default"].grad, rtol=ROUNDING, atol=ROUNDING
    )
    assert not adapter.lora_A.grad[:, 0].any()
    expected = ours(ids)
    fastpeft.merge(ours)
    torch.testing.assert_close(ours(ids), expected, rtol=ROUNDING, atol=ROUNDING)
