"""Sampling: what transformers' processors leave is drawn from, each row as if it were alone, by exact sums."""

import pytest
import torch

from fastpeft.serving.engine.adjusting import adjusted
from fastpeft.serving.engine.sampling import _pick, _pick_from_the_top, _pick_from_the_top_of, _units, next_tokens
from fastpeft.serving.engine.settings import SamplingParams
from tests.support.batching import drawing

VOCABULARY = 200
SETTINGS = [
    {"top_k": 5},
    {"top_k": 1},
    {"top_k": 10**6},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_p": 0.7},
    {"top_p": 0.999},
    {"top_k": 20, "top_p": 0.8},
    {"top_k": 20, "min_p": 0.1, "temperature": 0.7},
    {"top_k": 50, "top_p": 0.9, "min_p": 0.02, "temperature": 1.7},
]


def logits_of(rows, seed=0, vocabulary=VOCABULARY):
    return 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def left_by_transformers(logits, settings):
    from transformers.generation import logits_process as processors

    scores = logits / settings.get("temperature", 1.0)
    chain = [
        processors.TopKLogitsWarper(settings["top_k"]) if "top_k" in settings else None,
        processors.TopPLogitsWarper(settings["top_p"]) if "top_p" in settings else None,
        processors.MinPLogitsWarper(settings["min_p"]) if "min_p" in settings else None,
    ]
    for processor in filter(None, chain):
        scores = processor(None, scores)
    return scores.softmax(-1)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_draws_follow_what_transformers_leaves(settings):
    """Of 2,000 draws none falls on what is excluded, and each token's share is its probability, within 5 sigma."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    logits, count = logits_of(1), 2_000
    expected = left_by_transformers(logits, settings)[0]
    request = drawing(**{"temperature": 1.0, "seed": 0, **settings})
    drawn = torch.tensor(next_tokens(logits.expand(count, -1), [request] * count))
    share = torch.bincount(drawn, minlength=VOCABULARY) / count
    assert not share[expected == 0].any()
    sigma = (expected * (1 - expected) / count).sqrt()
    assert ((share - expected).abs() <= 5 * sigma + 1 / count).all()


def test_rows_do_not_depend_on_each_other():
    """Each row draws the same with others, whatever they ask for, as alone."""
    greedy = {"temperature": 0.0}
    everyone = [greedy, *SETTINGS, {}, greedy, {"repetition_penalty": 1.5}, {"logit_bias": {3: 50.0}}, greedy]
    rows = logits_of(len(everyone)).bfloat16()  # with ties
    for seed in range(10):
        made = [{"temperature": 1.3, "seed": seed + 10 * i, **settings} for i, settings in enumerate(everyone)]
        together = next_tokens(rows, [drawing(**settings) for settings in made])
        alone = [next_tokens(rows[i : i + 1], [drawing(**settings)])[0] for i, settings in enumerate(made)]
        assert together == alone


def test_greedy_is_the_first_of_the_largest():
    rows = logits_of(6)
    rows[1], rows[2, [7, 150]] = 0.0, 50.0  # ties
    expected = [row.tolist().index(row.max().item()) for row in rows]
    assert next_tokens(rows, [drawing()] * 6) == expected
    mixed = [drawing(temperature=float(i == 3)) for i in range(6)]
    assert [token for i, token in enumerate(next_tokens(rows, mixed)) if i != 3] == expected[:3] + expected[4:]


def test_a_draw_falls_where_the_cumulated_units_pass_its_share():
    """By the definition in Python's integers, at every border between two tokens and beside it."""
    rows = [[3, 0, 5, 1], [0, 0, 2, 0], [1, 0, 0, 0], [2**38, 1, 2**38 - 1, 7], [0, 1, 1, 2**30]]
    for units in rows:
        total, shares = sum(units), {0, 1, 2**24 - 1}
        for i in range(4):
            border = (sum(units[: i + 1]) << 24) // total
            shares |= {min(max(border + near, 0), 2**24 - 1) for near in (-1, 0, 1)}
        for u in sorted(shares):
            expected = next(i for i in range(4) if sum(units[: i + 1]) > (total * u) >> 24)
            assert _pick(torch.tensor([units]), torch.tensor([[u]])).tolist() == [expected], (units, u)


@pytest.mark.parametrize(
    "settings",
    [{}, {"top_p": 0.5}, {"top_k": 3}, {"min_p": 0.3}, {"min_p": 0.3, "top_p": 0.5}, {"temperature": 0.0}],
    ids=str,
)
@pytest.mark.parametrize("value", [-torch.inf, torch.nan], ids=str)
def test_rows_without_a_token_that_is_possible(settings, value):
    """They are told apart, and the others draw what they draw alone."""
    rows = logits_of(3)
    expected = next_tokens(rows[::2], [drawing(**{"temperature": 1.0, "seed": 5, **settings}) for _ in range(2)])
    rows[1] = value
    found = next_tokens(rows, [drawing(**{"temperature": 1.0, "seed": 5, **settings}) for _ in range(3)])
    assert found == [expected[0], None, expected[1]]


@pytest.mark.parametrize("top_p", [0.0, 0.3, 0.9, 1 - 2**-20])
def test_sorting_only_the_largest_changes_nothing(top_p):
    """The way of a CPU and that of a GPU are one function, also at ties."""
    rows = torch.cat([logits_of(20), logits_of(20).round(), torch.zeros(1, VOCABULARY)])
    requests = [drawing(temperature=1.0, top_p=top_p)] * len(rows)
    total, units = _units(rows, requests)
    u = torch.randint(2**24, (len(rows), 1), generator=torch.Generator().manual_seed(1))
    limits = top_p * total.double()
    batched = _pick_from_the_top(units, limits, u).tolist()
    assert batched == [int(_pick_from_the_top_of(*each, top_p)) for each in zip(units, limits, u, strict=True)]


def test_a_large_vocabulary_keeps_its_rarest_tokens():
    """The sums of 150,000 probabilities are exact: the last token comes where its share of the draws begins."""
    logits = torch.zeros(1, 150_000)
    total, units = _units(logits, [drawing(temperature=1.0)])
    assert total.item() == units.sum().item() == 150_000 * int(2**38 * torch.tensor(1 / 150_000).item())


def test_penalties_are_transformers_and_openais():
    processors = pytest.importorskip("transformers.generation.logits_process", reason="transformers is not installed")
    rows = logits_of(3)
    prompt, answer = [4, 9, 9, 17], [9, 30, 30, 30]
    repeated = drawing(prompt=prompt, tokens=answer, repetition_penalty=1.4)
    penalised = drawing(
        prompt=prompt, tokens=answer, presence_penalty=0.5, frequency_penalty=-0.25, logit_bias={30: -3, 5: 7}
    )
    found = adjusted(rows, [repeated, drawing(), penalised])
    ids = torch.tensor([prompt + answer])
    assert torch.equal(found[:1], processors.RepetitionPenaltyLogitsProcessor(1.4)(ids, rows[:1]))
    assert torch.equal(found[1], rows[1])
    expected = rows[2].clone()
    expected[30] += -3 - (0.5 - 0.25 * 3)
    expected[9] -= 0.5 - 0.25
    expected[5] += 7
    torch.testing.assert_close(found[2], expected, rtol=2**-22, atol=0)  # a sum of three in another order
    repeated.tokens.append(50)  # one step on
    ids = torch.tensor([prompt + answer + [50]])
    again = adjusted(rows[:1], [repeated])
    assert torch.equal(again, processors.RepetitionPenaltyLogitsProcessor(1.4)(ids, rows[:1]))
    assert adjusted(rows, [drawing()] * 3) is rows


def test_an_end_is_held_back():
    rows = torch.zeros(2, 9)
    rows[:, 7] = 5.0
    early, late = (drawing(stop_ids=[7, 10**6], tokens=tokens, min_tokens=2) for tokens in ([1], [1, 1]))
    assert next_tokens(rows, [early, late]) == [0, 7]


def test_logprobs_are_the_models():
    rows = logits_of(3).bfloat16()
    requests = [drawing(logprobs=2, temperature=0.5, logit_bias={1: 100.0}), drawing(), drawing(logprobs=0)]
    tokens = next_tokens(rows, requests)
    assert tokens[0] == 1
    first, none, third = (request.next_logprobs for request in requests)
    expected = rows.float().log_softmax(-1)
    assert none is None
    assert (first.token, first.logprob) == (1, expected[0, 1].item())
    assert [token for token, _ in first.top] == rows[0].float().topk(2).indices.tolist()
    assert [logprob for _, logprob in first.top] == expected[0].topk(2).values.tolist()
    assert (third.logprob, third.top) == (expected[2].max().item(), ())
    bad = drawing(logprobs=2)
    assert next_tokens(rows[:1] * torch.nan, [bad]) == [None]
    assert bad.next_logprobs is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("temperature", value) for value in (-1, float("nan"), float("inf"), "1", True, 1e39)),
        *(("top_k", value) for value in (-1, 1.5, True)),
        *(("min_p", value) for value in (-0.1, 1.1)),
        *(("repetition_penalty", value) for value in (0, -1, 1e-4, 1e4)),
        *(("presence_penalty", 2.1), ("frequency_penalty", -2.1), ("logprobs", 21), ("prompt_logprobs", -1)),
        *(("logit_bias", {-1: 0}), ("logit_bias", {1: 101}), ("min_tokens", -1)),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"submit: {name} is .*, expected "):
        SamplingParams(**{name: value})
