"""Where prompts come in: whatever is called with tokens, once a sequence, whatever the cache is called."""

import copy
import pickle

import pytest
import torch

import fastpeft
from fastpeft import PromptTuning, attach
from fastpeft.nn.entry import entered
from tests.support.decoders import build as decoder
from tests.support.models import bert_tokens, close, gpt2, llama, prompts, qwen2_vl, t5
from tests.support.prompted import with_prompts


@pytest.mark.parametrize("make", [llama, gpt2, bert_tokens])
def test_every_way_in_sees_the_prompt(make):
    """The model and its backbone, called and by the name of their forward; the head makes of one what the other is."""
    model, ids = with_prompts(make(), a=3), prompts(2)
    (_, backbone), head = list(entered(model).items())[-1], model.get_output_embeddings()
    wanted = model(ids).logits
    assert wanted.shape[1] == 10
    assert torch.equal(model.forward(ids).logits, wanted)
    hidden = backbone(ids).last_hidden_state
    assert torch.equal(backbone.forward(ids).last_hidden_state, hidden)
    assert not torch.equal(hidden[:, 3:], type(model)(model.config).base_model(ids)[0])
    if head is not None:
        assert torch.equal(head(hidden), wanted)
    with fastpeft.disable_adapter(model):
        assert torch.equal(backbone(ids).last_hidden_state, make().base_model(ids).last_hidden_state)


def test_encoder_by_itself():
    model, ids = with_prompts(t5(), a=3), prompts(2)
    assert model.get_encoder().forward(ids).last_hidden_state.shape[1] == 10


def test_forwards_of_others_and_signatures():
    """What another library put in place of a forward is called, and comes back; so does a pickled model's entry."""
    import inspect

    model, ids = llama(), prompts(2)
    plain, signature, inner, calls = model(ids).logits, inspect.signature(model.forward), model.forward, []
    model.forward = lambda *args, **kwargs: (calls.append(1), inner(*args, **kwargs))[1]
    theirs = model.forward
    with_prompts(model, a=3)
    assert inspect.signature(model.model.forward) == inspect.signature(type(model.model).forward.__get__(model.model))
    wanted = model(ids).logits
    assert calls == [1]
    fastpeft.detach(model)
    assert model.forward is theirs
    del model.forward
    with_prompts(model, a=3)
    assert inspect.signature(model.forward) == signature
    assert torch.equal(type(model.forward).__call__(model.forward, model, ids).logits, wanted)  # bound once more
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(ids).logits, wanted)
        with torch.no_grad():
            other.fastpeft_prompt.prompts["a"].zero_()
        assert torch.equal(model(ids).logits, wanted)
        assert torch.equal(fastpeft.detach(other)(ids).logits, plain)


@pytest.mark.parametrize("family", ["mamba", "jamba", "recurrent_gemma", "rwkv"])
def test_decoding_goes_on_after_the_prompt(family):
    """State that is called cache_params, or state, or that no output hands back, step by step."""
    model = decoder(family)
    ours, ids = with_prompts(copy.deepcopy(model), a=4), prompts(2)
    x = torch.cat([ours.fastpeft_prompt.prompts["a"].expand(2, -1, -1), model.get_input_embeddings()(ids)], 1)
    from transformers import DynamicCache

    handed = family in ("jamba", "recurrent_gemma")
    caches = [{"past_key_values": DynamicCache(config=model.config)} if handed else {} for _ in range(2)]
    one, two = ours(ids, use_cache=True, **caches[0]), model(inputs_embeds=x, use_cache=True, **caches[1])
    for step in range(3):
        assert close(one.logits[:, -1], two.logits[:, -1]), step
        if handed:  # with masks, as generate gives them: the caller's do not count the prompt
            masks = (torch.ones(2, n + step + 1, dtype=torch.int64) for n in (ids.shape[1], x.shape[1]))
            caches = [{**cache, "attention_mask": mask} for cache, mask in zip(caches, masks, strict=True)]
        else:
            name = "cache_params" if family == "mamba" else "state"
            caches = [{name: one[name]}, {name: two[name]}]
        more = two.logits[:, -1:].argmax(-1)
        one, two = (m(more, use_cache=True, **c) for m, c in ((ours, caches[0]), (model, caches[1])))


@pytest.mark.parametrize("family", ["mamba", "llama"])
def test_a_cache_that_began_without_a_prompt(family):
    """A prompt never comes in the middle of a sequence."""
    plain, ids = decoder(family), prompts(2)
    model, name = with_prompts(copy.deepcopy(plain), a=3), "cache_params" if family == "mamba" else "past_key_values"
    with fastpeft.disable_adapter(model):
        ours = model(ids, use_cache=True)
    theirs = plain(ids, use_cache=True)
    more = ids[:, :1]
    one, two = (m(more, use_cache=True, **{name: out[name]}) for m, out in ((model, ours), (plain, theirs)))
    assert close(one.logits, two.logits)


def test_an_emptied_cache_begins_anew():
    from transformers import StaticCache

    model, ids = with_prompts(llama(), a=3), prompts(2)
    cache = StaticCache(config=model.config, max_cache_len=8)
    wanted = model(ids).logits
    for _ in range(2):
        assert close(model(ids, past_key_values=cache, use_cache=True).logits, wanted)
        cache.reset()


def test_positions_of_three_rows():
    """Qwen2-VL numbers an image's patches by row and column: a prompt of a text's embeddings is that text in front."""
    model, given = qwen2_vl()
    text = torch.tensor([[11, 12, 13]])
    front = {
        **given,
        "input_ids": torch.cat([text, given["input_ids"]], 1),
        "mm_token_type_ids": torch.cat([torch.zeros_like(text), given["mm_token_type_ids"]], 1),
        "attention_mask": torch.ones(1, 3 + given["input_ids"].shape[1], dtype=torch.int64),
    }
    how = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    plain = copy.deepcopy(model)
    wanted, logits = plain(**front).logits, torch.stack(copy.deepcopy(model).generate(**front, **how).logits)
    attach(model, PromptTuning(length=3, init="text", text=text[0].tolist()))
    assert close(model(**given).logits, wanted)
    assert model(**given, labels=given["input_ids"]).loss.isfinite()
    assert close(torch.stack(model.generate(**given, **how).logits), logits)


def test_offloaded_models():
    """Weights that accelerate brings for each call: the prompt stays where the model computes."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model, ids = llama(), prompts(2)
    accelerate.cpu_offload(model, torch.device("cpu"))
    attach(model, PromptTuning(length=3))
    attach(model, PromptTuning(length=2, init="text", text=[5, 7]), name="text")
    model(ids, labels=ids).loss.backward()
    prompt = model.fastpeft_prompt.prompts["default"]
    assert prompt.device.type == prompt.grad.device.type == "cpu"
    assert torch.equal(model.fastpeft_prompt.prompts["text"], llama().get_input_embeddings().weight[[5, 7]])


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("reformer", "past_buckets_states"),
        ("xlm", "cache"),
        ("deepseek_v4", "experts by token ids"),
        ("ctrl", "in place"),
    ],
)
def test_refused_by_name(family, reason):
    model = decoder(family)
    with pytest.raises(TypeError, match=f"attach: PromptTuning does not serve {type(model).__name__}: .*{reason}"):
        attach(model, PromptTuning(length=3))
    assert "forward" not in vars(model)
