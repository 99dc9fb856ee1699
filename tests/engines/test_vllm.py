"""vLLM's engine with our LoRA layers, on a CPU: what each request gets is what PEFT gives its adapter alone."""

import itertools
import os

import pytest

from tests.support import lora_checkpoints, real_vllm
from tests.support.real_vllm import BLOCK, MAX_RANK, NAMES, greedy, request

LONG = [(7 * i + 3) % 90 + 1 for i in range(200)]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="module")
def folders(root):
    found = real_vllm.write(root)
    for seed, name in enumerate(("dave", "erin"), 7):
        lora_checkpoints.checkpoint(real_vllm.model(), root / name, seed, r=5, target_modules=["q_proj", "up_proj"])
        found[name] = root / name
    return found


@pytest.fixture(scope="module")
def peft(folders):
    return real_vllm.Checker(folders)


@pytest.fixture(scope="module")
def llm(root, folders):
    os.environ.update(real_vllm.IN_PROCESS, FASTPEFT_VLLM="strict")
    return real_vllm.engine(root / "base")


@pytest.fixture
def requests(folders):
    """The request of each adapter, and None for the base model."""
    return {None: None} | {name: request(name, 1 + i, folder) for i, (name, folder) in enumerate(folders.items())}


@pytest.fixture(autouse=True)
def _fresh(llm):
    """No test finds the adapters or the cached prompts of another."""
    llm.reset_prefix_cache()
    for number in llm.llm_engine.list_loras():
        llm.llm_engine.remove_lora(number)


def generate(llm, requests, prompts, names, tokens=12):
    """One batch; (prompt, answer, name) of each, and vLLM's own outputs."""
    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    asked = [requests[name] for name in names]
    outputs = llm.generate(given, greedy(tokens), lora_request=asked, use_tqdm=False)
    return [(p, list(o.outputs[0].token_ids), name) for p, o, name in zip(prompts, outputs, names)], outputs


def faults(peft, answers):
    assert answers
    return [(name, places) for prompt, answer, name in answers if (places := peft.wrong(prompt, answer, name))]


def wrapper(llm):
    return manager(llm).punica_wrapper_mapping["language_model"]


def manager(llm):
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    return worker.model_runner.lora_manager._adapter_manager


def metric(llm, name):
    return next(found.value for found in llm.get_metrics() if found.name == name)


def test_vllm_has_built_our_wrapper(llm):
    assert type(wrapper(llm)).__name__ == "FastPunicaWrapperCPU"


def test_a_mixed_batch_is_peft_adapter_by_adapter(llm, peft, requests):
    """Every slot is taken, so a row without an adapter that was given the last slot's would show."""
    names = [*NAMES, None, "alice", None]
    prompts = [LONG[i : i + 3 + 2 * i] for i in range(len(names))]
    answers, _ = generate(llm, requests, prompts, names)
    assert faults(peft, answers) == []
    assert peft.wrong(*answers[0][:2], "bob"), "the check sees another adapter's answer"


def test_more_adapters_than_slots_take_turns(llm, peft, requests):
    names = [*requests] * 2
    answers, _ = generate(llm, requests, [LONG[i : i + 5] for i in range(len(names))], names)
    assert faults(peft, answers) == []


def test_slots_cost_their_adapters_own_ranks(llm, requests):
    """vLLM pads to 16; what is computed ends at the rank of each layer's adapter, patterns included."""
    from fastpeft.integrations import _vllm_ranks

    generate(llm, requests, [[1, 2, 3]] * 3, NAMES, tokens=1)
    own = manager(llm)
    places = [own.lora_index_to_id.index(requests[name].lora_int_id) for name in NAMES]

    def ranks(module):
        found = _vllm_ranks.ranks_of(own.modules[module].lora_a_stacked[0])
        return [[row[place] for place in places] for row in found.tolist()]

    assert own.modules["model.layers.1.self_attn.qkv_proj"].lora_a_stacked[0].shape[2] == MAX_RANK
    assert ranks("model.layers.1.self_attn.qkv_proj") == [[4, 8, 3], [4, 0, 6], [4, 8, 6]]
    assert ranks("model.layers.1.mlp.gate_up_proj") == [[4, 0, 6], [4, 0, 12]]
    assert ranks("model.layers.0.mlp.down_proj") == [[4, 8, 6]]


def test_prompts_are_shared_within_an_adapter_and_never_across(llm, peft, requests):
    prompt, names = LONG[: 3 * BLOCK + 5], ["alice", "bob", None]
    for round_, name in itertools.product((1, 2), names):
        answers, (output,) = generate(llm, requests, [prompt], [name])
        assert faults(peft, answers) == []
        assert output.num_cached_tokens == (0 if round_ == 1 else 3 * BLOCK), (round_, name)


def test_long_prompts_are_read_in_chunks_beside_running_rows(llm, peft, requests):
    """A step reads 64 tokens, and the prompts have 200: each takes several, beside the tokens of the others."""
    names = ["alice", None, "carol"]
    prompts = [LONG[:4], LONG[1:], LONG[::-1]]
    answers, _ = generate(llm, requests, prompts, names, tokens=30)
    assert faults(peft, answers) == []


def test_requests_that_lose_their_cache_give_the_same_answer(llm, peft, requests):
    """24 blocks of 32 tokens, and eight requests that want 5 each."""
    before = metric(llm, "vllm:num_preemptions")
    names = [*NAMES, None, *NAMES, None]
    answers, _ = generate(llm, requests, [LONG[i : i + 40] for i in range(8)], names, tokens=110)
    assert metric(llm, "vllm:num_preemptions") > before
    assert faults(peft, answers) == []


def run(engine, until=lambda: False):
    """Steps of the engine, until all is answered or ``until``; the answers of what has finished."""
    found = {}
    while engine.has_unfinished_requests() and not until():
        for output in engine.step():
            if output.finished:
                found[output.request_id] = list(output.outputs[0].token_ids)
    return found


def test_adapters_are_loaded_replaced_and_unloaded_under_load(llm, peft, requests, folders, root):
    """Rows of other adapters run on; what comes after a replacement gets the new weights."""
    engine, prompt, asked = llm.llm_engine, LONG[:9], {}

    def submit(key, name, lora):
        asked[key] = name
        engine.add_request(key, {"prompt_token_ids": prompt}, greedy(60), lora_request=lora)

    def steps(count):
        left = iter(range(count))
        return run(engine, lambda: next(left, None) is None)

    changed = request("dave", 20, folders["dave"])
    submit("alice", "alice", requests["alice"])
    submit("base", None, None)
    found = steps(5)
    assert engine.add_lora(changed)
    submit("first", "dave", changed)
    found |= steps(70)
    assert engine.add_lora(request("dave", 20, folders["erin"], load_inplace=True))
    submit("bob", "bob", requests["bob"])
    found |= steps(5)
    submit("second", "erin", request("dave", 20, folders["erin"]))
    found |= steps(5)
    assert engine.remove_lora(20) is False or 20 not in engine.list_loras()
    found |= run(engine)
    assert faults(peft, [(prompt, found[key], name) for key, name in asked.items()]) == []
