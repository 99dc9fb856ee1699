"""transformers' continuous batching with a bank: requests for different adapters join and leave, none sees another."""

import random

import pytest
import torch

from fastpeft.serving import AdapterBank, BankError, BankFull, UnknownAdapter

pytest.importorskip("peft", reason="PEFT is not installed")
from transformers import GenerationConfig

from tests.support.lora_checkpoints import SETTINGS, checkpoints, greedy_alone, same_or_tied
from tests.support.models import VOCAB, llama

integration = pytest.importorskip(
    "fastpeft.integrations.transformers", exc_type=ImportError, reason="transformers has no continuous batching"
)
NAMES = list(SETTINGS)


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    model = llama()
    with AdapterBank(model, slots=3, max_rank=12) as bank:
        for name, folder in checkpoints(model, tmp_path_factory.mktemp("adapters")).items():
            bank.load(name, folder)
        yield bank


def settings(**changes):
    small = {"page_size": 8, "num_blocks": 96, "max_batch_tokens": 24, "max_requests_per_batch": 5}
    return {
        "generation_config": GenerationConfig(do_sample=False, max_new_tokens=6, eos_token_id=-1, pad_token_id=0),
        "continuous_batching_config": integration.ContinuousBatchingConfig(**{**small, **changes}),
    }


def test_requests_join_and_leave(bank):
    """More requests, adapters and tokens than fit at once; long prompts are read in pieces beside rows that decode."""
    choose = random.Random(1)
    inputs = [[choose.randrange(1, VOCAB) for _ in range(choose.choice([1, 4, 9, 33]))] for _ in range(24)]
    inputs[7] = inputs[3]  # one prompt for two adapters shares no cache
    adapters = [choose.choice([None, *NAMES]) for _ in inputs]
    adapters[3], adapters[7] = "alice", "bob"
    counts = [choose.randint(1, 12) for _ in inputs]
    implementation = bank.model.config._attn_implementation
    outputs = integration.generate_batch(bank, inputs, adapters, max_new_tokens=counts, **settings())
    ties = 0
    for ids, name, count, output in zip(inputs, adapters, counts, outputs, strict=True):
        assert output.error is None
        assert output.prompt_ids == ids
        ties += same_or_tied(bank, ids, name, output.generated_tokens, greedy_alone(bank, ids, name, count))
    assert ties <= 2
    assert bank.model.config._attn_implementation == implementation
    assert not any(adapter.leases for adapter in bank._slots.held if adapter is not None)


def test_what_cannot_be_served_is_turned_off():
    config = integration._plain(integration.ContinuousBatchingConfig(page_size=16, use_cuda_graph=True))
    assert (config.page_size, config.use_cuda_graph, config.allow_block_sharing) == (16, False, False)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"adapter_names": ["alice"]}, ValueError, "generate_batch: adapter_names has 1 items, expected 2"),
        ({"max_new_tokens": [1]}, ValueError, r"max_new_tokens has 1 items, expected 2"),
        ({"adapter_names": "ab"}, TypeError, "generate_batch: adapter_names is 'ab'"),
        ({"adapter_names": ["alice", "eve"]}, UnknownAdapter, "generate_batch: no adapter 'eve'"),
        *(
            ({"generation_config": GenerationConfig(**{"do_sample": True, **asked})}, ValueError, f"has {named}")
            for asked, named in (
                ({"num_return_sequences": 2}, "num_return_sequences=2, which .* ignores"),
                ({"num_beams": 2, "do_sample": False}, "num_beams=2"),
                ({"stop_strings": ["x"]}, r"stop_strings=\['x'\]"),
                ({"repetition_penalty": 1.2}, "RepetitionPenaltyLogitsProcessor"),
            )
        ),
    ],
)
def test_errors(bank, arguments, error, message):
    with pytest.raises(error, match=message):
        integration.generate_batch(
            **{"bank": bank, "inputs": [[1], [2, 3]], "adapter_names": ["alice", None], **settings(), **arguments}
        )
    assert not any(adapter.leases for adapter in bank._slots.held if adapter is not None)


def test_full_bank_and_changed_interface(bank, monkeypatch):
    for name in NAMES[:3]:
        bank.pin(name)
    with pytest.raises(BankFull, match="3 others are pinned"):
        integration.generate_batch(bank, [[1, 2]], ["dave"], **settings())
    for name in NAMES[:3]:
        bank.unpin(name)
    monkeypatch.setattr(integration, "FutureRequestState", object)
    with pytest.raises(BankError, match="has no state, query_length, has_new_token"):
        integration.generate_batch(bank, [[1, 2]], ["dave"], **settings())


def test_the_head_of_picked_tokens(bank):
    """Only some of the packed tokens reach a head that an adapter has changed."""
    head = bank.model.lm_head
    x = torch.randn(1, 3, head.in_features, generator=torch.Generator().manual_seed(0))
    with bank.use(["dave", None, "dave"], lengths=[4, 1, 3], picked=[3, 4, 7]):
        logits = head(x)
    with bank.use(["dave"]):
        dave = head(x)
    bare = head(x)
    torch.testing.assert_close(logits[:, [0, 2]], dave[:, [0, 2]], rtol=1e-5, atol=1e-5)
    assert torch.equal(logits[:, 1], bare[:, 1])
