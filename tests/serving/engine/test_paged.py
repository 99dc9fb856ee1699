"""The paged cache: rows of many families, blocks that run out, prompts in pieces, and turns between tenants."""

import pytest
import torch

from fastpeft.serving import AdapterBank, Batcher, QueueFull
from fastpeft.serving.engine import paged_rows

pytest.importorskip("peft", reason="PEFT is not installed")
from tests.support.batching import prompt, step
from tests.support.decoders import build
from tests.support.lora_checkpoints import checkpoint, greedy_alone, same_or_tied

PAGED = {
    "mistral": {}, "qwen2": {}, "gemma2": {}, "gemma3_text": {}, "gpt_oss": {}, "starcoder2": {}, "qwen3": {},
    "gpt2": {}, "opt": {}, "phi3": {}, "olmo2": {}, "granite": {}, "cohere": {}, "smollm3": {}, "gpt_neox": {},
    "llama": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                                  "original_max_position_embeddings": 128}},
}  # fmt: skip
PADDED = {
    "bloom": "it takes no position_ids", "mpt": "it takes no position_ids", "falcon": "a paged step fails",
    "deepseek_v3": "its cache keeps less", "gptj": "0 of 2 layers call",
    "llama4_text": "layers of kind chunked_attention",
}  # fmt: skip
ROPES = {
    "phi3": {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "factor": 4.0,
        "original_max_position_embeddings": 24,
    },
    "llama": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
}  # fmt: skip


def served(model, folder):
    for config in (model.config, model.config.get_text_config()):
        config.eos_token_id = None
    linears = {path.rpartition(".")[2] for path, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    attention = sorted(linears & {"q_proj", "qkv_proj", "o_proj", "query_key_value", "c_attn", "Wqkv", "kv_b_proj"})
    bank = AdapterBank(model, slots=2, max_rank=4)
    target = attention or sorted(path for path, m in model.named_modules() if path.endswith("c_attn"))
    bank.load("all", checkpoint(model, folder, 1, r=4, target_modules=target))
    return bank


def as_alone(bank, batcher, asked):
    """Each request's tokens, of rows that join one by one."""
    requests = []
    for ids, name, count in asked:
        requests.append(batcher.submit(ids, name, max_new_tokens=count))
        step(batcher)
    step(batcher, 40)
    for request, (ids, name, count) in zip(requests, asked, strict=True):
        same_or_tied(bank, ids, name, request.result(0), greedy_alone(bank, ids, name, count))


ASKED = [(prompt(4), "all", 9), (prompt(21, 1), None, 6), (prompt(2, 2), "all", 7), (prompt(11, 3), None, 9)]


@pytest.mark.parametrize("family", [*PAGED, *PADDED])
def test_families(family, tmp_path):
    """Rows of different lengths equal each alone; which cache serves the family is said, with the reason."""
    model = build(family, **PAGED.get(family, {}))
    bank = served(model, tmp_path)
    batcher = Batcher(bank, max_rows=4, max_tokens=64)
    kind = batcher.explain()
    assert (
        ("paged, eager (on cpu): a cache of" in kind)
        if family in PAGED
        else (PADDED[family] in kind and "padded (" in kind)
    ), kind
    as_alone(bank, batcher, ASKED)


@pytest.mark.parametrize("family", ROPES)
def test_a_row_has_the_rope_of_its_own_length(family, tmp_path, monkeypatch):
    """Beside a long row, across the length where the frequencies change, and with the prompt read in pieces."""
    monkeypatch.setattr("fastpeft.serving.engine.paged_rows.PROMPT_TOKENS", 16)
    settings = {"max_position_embeddings": 96 if family == "phi3" else 24, "rope_parameters": ROPES[family]}
    bank = served(build(family, **settings), tmp_path)
    long = prompt(40, 5), None, 12
    as_alone(bank, Batcher(bank, max_rows=4, max_tokens=96), [long, *ASKED, (prompt(20, 6), "all", 9)])


def test_a_growing_rope_needs_a_paged_cache(monkeypatch):
    monkeypatch.setattr("fastpeft.serving.engine.rows.unpaged_reason", lambda *_: "it takes no position_ids")
    model = build("llama", rope_parameters=ROPES["llama"])
    with pytest.raises(ValueError, match="LlamaForCausalLM, whose rotary embedding depends on the longest row"):
        Batcher(AdapterBank(model))


def test_blocks_that_run_out(bank):
    """The youngest rows give theirs back, and end with the tokens that they would have had."""
    batcher = Batcher(bank, max_rows=4, max_cached=100)
    asked = [(prompt(30, i), name, 12) for i, name in enumerate(("alice", None, "bob", "alice"))]
    requests = [batcher.submit(ids, name, max_new_tokens=count) for ids, name, count in asked]
    step(batcher, 60)
    assert batcher._rows.preempted
    for request, (ids, name, count) in zip(requests, asked, strict=True):
        same_or_tied(bank, ids, name, request.result(0), greedy_alone(bank, ids, name, count))
    assert batcher._rows._pages.free == batcher._rows._pages.blocks
    assert not batcher._rows._pages._memory.any()  # nothing of a tenant stays for the next


def test_a_prompt_is_read_in_pieces_beside_the_others(bank, monkeypatch):
    """Every step gives every running row a token, whatever is being read."""
    monkeypatch.setattr("fastpeft.serving.engine.paged_rows.PROMPT_TOKENS", 16)
    batcher = Batcher(bank, max_rows=4)
    stream = batcher.submit(prompt(5), "alice", max_new_tokens=30)
    step(batcher)
    long, short = batcher.submit(prompt(90, 1), "bob", max_new_tokens=2), batcher.submit(prompt(4, 2), max_new_tokens=2)
    for turn in range(2, 12):
        step(batcher)
        assert len(stream.tokens) == turn
        assert short.tokens  # which waits for nobody's long prompt
    assert long.done
    alone = greedy_alone(bank, long.prompt, "bob", 2)
    same_or_tied(bank, long.prompt, "bob", long.result(0), alone)
    step(batcher, 20)
    assert stream.done


def test_prompts_of_one_length_are_read_together(bank, monkeypatch):
    """Whole or in pieces; others are by themselves, and all get the tokens that they have alone."""
    monkeypatch.setattr("fastpeft.serving.engine.paged_rows.PROMPT_TOKENS", 40)
    layouts, made = [], paged_rows.Layout
    monkeypatch.setattr(paged_rows, "Layout", lambda *given: layouts.append(made(*given)) or layouts[-1])
    batcher = Batcher(bank, max_rows=5)
    asked = [(prompt(8, i), name, 5) for i, name in enumerate(("alice", "bob", "alice"))]
    asked[1] = prompt(9, 4), "bob", 5
    requests = [batcher.submit(ids, name, max_new_tokens=count) for ids, name, count in asked]
    step(batcher)
    assert [(group.rows, group.queries) for group in layouts[-1].groups] == [(2, 8), (1, 9)]
    asked += [(prompt(40, i), name, 5) for i, name in enumerate(("bob", "alice"))]
    requests += [batcher.submit(ids, name, max_new_tokens=count) for ids, name, count in asked[3:]]
    step(batcher, 2)
    assert [(group.rows, group.queries) for group in layouts[-1].groups] == [(3, 1), (2, 20)]
    step(batcher, 20)
    asked += [(prompt(60, 7), "bob", 5), (prompt(60, 8), "alice", 5)]
    for ids, name, count in asked[5:]:  # the second comes when the first has read 40
        requests.append(batcher.submit(ids, name, max_new_tokens=count))
        step(batcher)
    assert [(group.rows, group.queries, group.longest) for group in layouts[-1].groups] == [(1, 20, 20), (1, 20, 60)]
    step(batcher, 20)
    for request, (ids, name, count) in zip(requests, asked, strict=True):
        same_or_tied(bank, ids, name, request.result(0), greedy_alone(bank, ids, name, count))


def test_a_crowd_of_one_tenant_delays_nobody(bank):
    batcher = Batcher(bank, max_rows=3, max_waiting=20)
    crowd = [batcher.submit(prompt(3), "alice", max_new_tokens=8) for _ in range(20)]
    with pytest.raises(QueueFull, match="20 requests wait"):
        batcher.submit(prompt(3), "alice")
    step(batcher, 2)
    first = [batcher.submit(prompt(4, 1), name, max_new_tokens=3) for name in ("bob", None)]
    step(batcher)
    assert [len(request.tokens) for request in first] == [1, 1]
    step(batcher, 80)
    alone = greedy_alone(bank, prompt(3), "alice", 8)
    for request in crowd:
        same_or_tied(bank, request.prompt, "alice", request.result(0), alone)
    assert all(request.done for request in first)


def test_turns_follow_the_weights(bank):
    """Two tenants with many requests each: rows by weight; a cap holds whatever is free."""
    batcher = Batcher(bank, max_rows=1, weights={"alice": 3})
    asked = [batcher.submit(prompt(3), name, max_new_tokens=1) for name in ["bob"] * 12 + ["alice"] * 12]
    step(batcher, 12)
    assert sum(request.done for request in asked[12:]) == 9
    with pytest.raises(ValueError, match="weights\\['bob'\\] is 0 \\(int\\), expected a finite number above 0"):
        Batcher(bank, weights={"bob": 0})
    capped = Batcher(bank, max_rows=4, adapter_rows=2, adapter_waiting=3)
    for _ in range(3):
        capped.submit(prompt(3), "alice", max_new_tokens=5)
    with pytest.raises(QueueFull, match="3 requests of adapter 'alice' wait, expected fewer than 3"):
        capped.submit(prompt(3), "alice")
    step(capped)
    assert (capped.running, capped.waiting) == (2, 1)
    step(capped, 12)
    assert (capped.running, capped.waiting) == (0, 0)


def test_the_default_cache_is_what_memory_holds(bank, monkeypatch):
    monkeypatch.setattr("fastpeft.serving.engine.rows.cache_bytes", lambda *_: 100 * 2 * 2 * 2 * 8 * 4)
    batcher = Batcher(bank)
    assert (batcher.max_cached, batcher.max_tokens) == (100, 100)
    assert Batcher(bank, max_rows=2, max_tokens=8).max_cached == 16
