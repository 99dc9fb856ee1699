"""model.generate with an adapter for each row: left padding, beams, sampling, streamers, and torch.compile."""

import pytest
import torch

from fastpeft.serving import AdapterBank

pytest.importorskip("peft", reason="PEFT is not installed")
from tests.support.lora_checkpoints import SETTINGS, checkpoints, greedy_alone, same_or_tied
from tests.support.models import VOCAB, llama, prompts

ROWS = ["alice", None, "dave", "bob", "carol"]


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    model = llama()
    with AdapterBank(model, slots=len(SETTINGS), max_rank=12) as bank:
        for name, folder in checkpoints(model, tmp_path_factory.mktemp("adapters")).items():
            bank.load(name, folder)
        yield bank


@pytest.mark.parametrize("cache", [True, False])
def test_greedy_equals_each_adapter_alone(bank, cache):
    ids = prompts(len(ROWS), 9)
    out = bank.generate(ids, adapter_names=ROWS, max_new_tokens=12, do_sample=False, use_cache=cache)
    ties = [
        same_or_tied(bank, row.tolist(), name, tokens[9:].tolist(), greedy_alone(bank, row.tolist(), name, 12))
        for row, name, tokens in zip(ids, ROWS, out, strict=True)
    ]
    assert sum(ties) <= 1
    assert len({tuple(row) for row in out[:, 9:].tolist()}) == len(ROWS), "adapters make no difference"


def test_left_padding(bank):
    lengths = [3, 9, 1, 6, 8]
    ids = prompts(len(ROWS), 9)
    mask = torch.tensor([[0] * (9 - n) + [1] * n for n in lengths])
    out = bank.generate(ids * mask, attention_mask=mask, adapter_names=ROWS, max_new_tokens=8, do_sample=False)
    for row, n, name, tokens in zip(ids, lengths, ROWS, out, strict=True):
        own = row[9 - n :].tolist()
        same_or_tied(bank, own, name, tokens[9:].tolist(), greedy_alone(bank, own, name, 8))


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
def test_beams_follow_their_row(bank, settings):
    ids = prompts(3)
    rows = ["alice", None, "bob"]
    out = bank.generate(ids, adapter_names=rows, max_new_tokens=6, do_sample=False, **settings)
    each = [
        bank.generate(ids[i : i + 1], adapter_names=[rows[i]], max_new_tokens=6, do_sample=False, **settings)
        for i in (0, 1, 2)
    ]
    assert torch.equal(out, torch.cat(each))


def test_sampling(bank):
    """Several sequences a row, drawn with PyTorch's generator."""
    settings = {"max_new_tokens": 6, "do_sample": True, "num_return_sequences": 3, "temperature": 0.7, "top_k": 0}
    outs = []
    for _ in range(2):
        torch.manual_seed(5)
        outs.append(bank.generate(prompts(2), adapter_names=["alice", "carol"], **settings))
    assert outs[0].shape == (6, 13)
    assert torch.equal(*outs)
    cold = bank.generate(prompts(2), adapter_names=["alice", "carol"], **{**settings, "temperature": 1e-4})
    assert torch.equal(cold[0], cold[2])
    assert cold[0, 7:].tolist() == greedy_alone(bank, prompts(2)[0].tolist(), "alice", 6)


def test_streamer(bank):
    class Streamer:
        def __init__(self):
            self.seen = []

        def put(self, value):
            self.seen += value.view(-1).tolist()

        def end(self):
            self.seen.append("end")

    streamer, ids = Streamer(), prompts(1)
    bank.generate(ids, adapter_names=["bob"], max_new_tokens=5, do_sample=False, streamer=streamer)
    assert streamer.seen == [*ids[0].tolist(), *greedy_alone(bank, ids[0].tolist(), "bob", 5), "end"]


def test_embeddings_as_input(bank):
    """A prompt of vectors: there are ids from the first new token on."""
    ids = prompts(2)
    with torch.no_grad(), bank.use(["alice", "dave"]):
        embeds = bank.model.get_input_embeddings()(ids)
    out = bank.generate(inputs_embeds=embeds, adapter_names=["alice", "dave"], max_new_tokens=5, do_sample=False)
    expected = bank.generate(ids, adapter_names=["alice", "dave"], max_new_tokens=5, do_sample=False)
    assert torch.equal(out, expected[:, 7:])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes(bank, mode):
    """In inference mode nothing is shared between siblings, and nothing that is loaded there stays there."""
    ids = prompts(len(ROWS))
    with bank.use(ROWS):
        expected = bank.model(ids).logits
    with mode(), bank.use(ROWS):
        logits = bank.model(ids).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert not expected.requires_grad


def test_siblings_share_one_call(bank, monkeypatch):
    """q, k and v in one, gate and up in one, inside of one call of what holds them; and nothing is kept after it."""
    from fastpeft import ops

    calls, run = [], ops.multi_lora_
    monkeypatch.setattr(
        ops, "multi_lora_", lambda y, *a: calls.append(len(y) if isinstance(y, list) else 1) or run(y, *a)
    )
    attention = bank.model.model.layers[0].self_attn
    ids, x = prompts(2), torch.randn(2, 3, 32)
    with bank.use(["alice", "bob"]):
        expected = bank.model(ids).logits
        assert calls == [3, 1, 2, 1] * 2
        attention.q_proj(x)
        x.data.mul_(2)  # which no version shows
        torch.testing.assert_close(attention.k_proj(x), attention.k_proj(x.clone()))
        assert calls[8:] == [1, 1, 1]
        with attention.k_proj.register_forward_pre_hook(lambda _, arguments: (arguments[0].clone(),)):
            torch.testing.assert_close(bank.model(ids).logits, expected)
        del calls[:]
        torch.testing.assert_close(bank.model(ids).logits, expected)
        assert calls == [1, 1, 1, 1, 2, 1, 3, 1, 2, 1]  # that group is none from then on


@pytest.mark.parametrize("change", ["nothing", "its values", "another tensor", "a later call"])
def test_siblings_take_what_was_computed_for_the_same_unchanged_tensor_alone(folders, change):
    """In the same call of what holds them, where the first computes for all; a group of its own for each change."""
    with (
        AdapterBank(llama(), slots=1, max_rank=16) as bank,
        bank.use([bank.load("alice", folders["alice"]) or "alice"]),
    ):
        attention = bank.model.model.layers[0].self_attn
        x, found = torch.randn(1, 3, 32), []

        def first(x):
            found.append(attention.q_proj(x))
            if change == "its values":
                x.add_(1)
            if change != "a later call":
                second(x.clone() if change == "another tensor" else x)

        def second(x):
            found.append(attention.k_proj(x))

        attention.forward = first
        attention(x)
        group = attention.q_proj.forward.__self__.siblings
        assert group._thread.__dict__.get("left") is None, "what nobody took is kept"
        if change == "a later call":
            attention.forward = second
            x.data.add_(1)  # which no version shows
            attention(x)
        before = x - 1 if change in ("its values", "a later call") else x
        torch.testing.assert_close(found, [attention.q_proj(before), attention.k_proj(x)])


def test_a_closed_bank_leaves_no_hooks():
    with AdapterBank(llama(), slots=1, max_rank=4) as bank:
        attention = bank.model.model.layers[0].self_attn
        assert attention._forward_pre_hooks
    assert not attention._forward_pre_hooks
    assert not attention._forward_hooks


def test_compile(bank):
    """The whole model in one graph, the same for all adapters, gives every batch its own."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(bank.model, backend=graphs, fullgraph=True)
    ids = prompts(2)
    for rows in (["alice", None], ["bob", "carol"], [None, None], ["dave", "alice"], ["bob", "bob"], ["carol", "dave"]):
        with bank.use(rows):
            for _ in range(2):
                torch.testing.assert_close(compiled(ids).logits, bank.model(ids).logits, rtol=1e-5, atol=1e-5)
    assert graphs.frame_count <= 3  # with a routing made there, with one that was there, and without adapters
    torch._dynamo.reset()


def test_unused_vocabulary_is_no_row(bank):
    with pytest.raises(ValueError, match="generate: input_ids is missing, but adapter_names has 1"):
        bank.generate(adapter_names=["alice"], max_new_tokens=2)
    with pytest.raises(ValueError, match="input_ids is of 3 rows, but adapter_names has 2"):
        bank.generate(torch.full((3, 2), VOCAB - 1), adapter_names=["alice", None], max_new_tokens=2)


def test_errors_inside_the_model_name_what_was_called(bank, monkeypatch):
    """A layer that sees rows it cannot tell apart says so in the name of generate, not of what generate calls."""
    monkeypatch.setattr(bank.model, "generate", lambda ids: bank.model(ids[:3]))
    with pytest.raises(ValueError, match="generate: adapter_names has 4 rows, but a layer received"):
        bank.generate(prompts(4), adapter_names=ROWS[:4])
