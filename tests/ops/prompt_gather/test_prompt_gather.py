"""prompt_gather against its definition: exact integers, error against float64, gradients, who is in the batch."""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from fastpeft import reference
from fastpeft.ops import prompt_gather
from fastpeft.ops.prompt_gather import REASONS
from fastpeft.testing import assert_no_worse
from fastpeft.testing.prompt_gather import PromptProblem, check
from tests.support.backends import BACKENDS, BF16, DEVICE, FP16, FP32, FP64
from tests.support.exactness import assert_same

each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_side = pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
each_source = pytest.mark.parametrize("embeds", [False, True], ids=["ids", "embeds"])


def served(*pairs):
    return [
        pytest.param(b, d, p, id=f"{b}-{d}-{p}".replace("torch.", ""))
        for b in BACKENDS
        for d, p in pairs
        if REASONS[b](torch.empty(0, dtype=d, device=DEVICE), torch.empty(0, dtype=p, device=DEVICE)) is None
    ]


TYPES = served((FP32, FP32), (FP16, FP16), (BF16, BF16), (FP16, FP32), (BF16, FP32))


def test_the_definition_is_the_formula():
    """By hand: a row padded left, one without a prompt and with a hole."""
    prompts = torch.tensor([[10.0], [20.0], [30.0]])
    x = torch.tensor([[[1.0], [2.0], [3.0]], [[4.0], [5.0], [6.0]]])
    mask = torch.tensor([[0, 1, 1], [1, 0, 1]])
    labels = torch.tensor([[7, 8, 9], [4, 5, 6]])
    y, on, positions, labelled = reference.prompt_gather(prompts, [1, 2], [1, -1], x, 5, mask, labels)
    assert y[..., 0].tolist() == [[20, 30, 2, 3, 0], [4, 5, 6, 0, 0]]
    assert on.tolist() == [[1, 1, 1, 1, 0], [1, 0, 1, 0, 0]]
    assert positions.tolist() == [[0, 1, 2, 3, 0], [0, 1, 2, 0, 0]]
    assert labelled.tolist() == [[-100, -100, 8, 9, -100], [4, 5, 6, -100, -100]]
    y, on, positions, _ = reference.prompt_gather(
        prompts, [1, 2], [0, 1], x, 5, mask, None, torch.tensor([[5, 0, 1], [0, 9, 2]]), left=True
    )
    assert y[..., 0].tolist() == [[0, 0, 10, 2, 3], [20, 30, 4, 5, 6]]
    assert on.tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 0, 1]]
    assert positions.tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 11, 4]]


@each_source
@each_side
@pytest.mark.parametrize("padded", [False, True])
@each_backend
def test_integers_are_exact(backend, padded, left, embeds):
    problem = PromptProblem.make(padded=padded, left=left, embeds=embeds, integers=True, device=DEVICE)
    assert_same(problem.exact(), problem.fused(backend))


@each_source
@pytest.mark.parametrize(("backend", "dtype", "prompt_dtype"), TYPES)
def test_error_against_float64(backend, dtype, prompt_dtype, embeds, record_property):
    ids = [(b * 7) % 4 - 1 for b in range(24)]
    problem = PromptProblem.make((20, 5, 33), ids, 9, 40, dtype, prompt_dtype, DEVICE, embeds=embeds)
    fused, eager, exact = problem.fused(backend), problem.eager(), problem.exact()
    for name in eager:
        ratios = assert_no_worse(fused[name], eager[name], exact[name], name)
        record_property("ratio", f"{ratios.max:5.2f} {ratios.rms:5.2f}  {name}")
    assert_same({n: exact[n] for n in ("mask", "positions", "labels")}, fused)


@each_source
@each_side
@each_backend
def test_gradcheck(backend, left, embeds):
    problem = PromptProblem.make((3, 2), (1, 0, -1, 1), 4, 5, FP64, device=DEVICE, left=left, embeds=embeds)
    side = "left" if left else "right"

    def function(x, *prompts):
        given = {"inputs_embeds": x} if embeds else {"input_ids": problem.ids, "embedding": problem.table}
        return prompt_gather(
            prompts, problem.prompt_ids, **given, attention_mask=problem.mask, padding_side=side, backend=backend
        ).inputs_embeds

    x = problem.table[problem.ids].requires_grad_(embeds)
    assert torch.autograd.gradcheck(function, (x, *(p.requires_grad_() for p in problem.prompts)), fast_mode=True)


@each_side
@each_backend
def test_a_row_gets_what_it_gets_alone(backend, left):
    problem = PromptProblem.make(device=DEVICE, left=left)
    side = "left" if left else "right"
    options = {"padding_side": side, "backend": backend, "embedding": problem.table}
    batch = prompt_gather(
        problem.prompts, problem.prompt_ids, problem.ids, attention_mask=problem.mask, labels=problem.labels, **options
    )
    for b, p in enumerate(problem.prompt_ids):
        row = slice(b, b + 1)
        alone = prompt_gather(
            problem.prompts, [p], problem.ids[row], attention_mask=problem.mask[row], labels=problem.labels[row],
            **options,
        )  # fmt: skip
        width = alone.attention_mask.shape[1]
        for together, single in zip(batch, alone, strict=True):
            assert torch.equal(together[row, -width:] if left else together[row, :width], single)


@each_backend
def test_rows_that_share_a_prompt_add_up_in_their_order(backend):
    """Also where so many rows are cut into parts; nobody else's gradient comes in."""
    ids = [b % 3 - 1 for b in range(37)]
    problem = PromptProblem.make((4, 9), ids, 1, 2, device=DEVICE, padded=False, integers=True)
    assert_same(problem.exact(), problem.fused(backend))
    noisy = PromptProblem.make((4, 9), ids, 1, 2, device=DEVICE, padded=False)
    first, again = noisy.fused(backend), noisy.fused(backend)
    assert all(torch.equal(first[name], again[name]) for name in first)


@each_backend
@pytest.mark.parametrize(
    ("lengths", "prompt_ids", "tokens", "columns"),
    [
        ((), (-1, -1), 5, 8),
        ((4,), (-1, -1), 5, 8),
        ((4,), (0,), 0, 8),
        ((4,), (), 5, 8),
        ((0,), (0, 0), 5, 8),
        ((0, 0), (0, -1), 0, 8),
        ((4, 2), (1, 1), 1, 0),
        ((4, 2), (1, 0), 5, 1),
        ((1, 127), (1, 0), 5, 17),
        ((3,), (0, 0), 17, 513),
        ((3,) * 20, (19, 0, 7), 4, 8),
    ],
    ids=str,
)
def test_hardly_a_batch(backend, lengths, prompt_ids, tokens, columns):
    padded = tokens > 3
    for left in (False, True):
        sizes = lengths, prompt_ids, tokens, columns
        problem = PromptProblem.make(*sizes, device=DEVICE, padded=padded, left=left, embeds=True, integers=True)
        if lengths and prompt_ids:
            assert_same(problem.exact(), problem.fused(backend))
        else:
            found = problem.fused(backend)
            assert found["y"].shape == (len(prompt_ids), tokens, columns)
            assert torch.equal(found["dx"], problem.dy * 1.0 if not padded else found["dx"])


@each_backend
def test_a_mask_longer_than_one_read(backend, monkeypatch):
    """The kernel reads 1024 positions of the mask at a time, here 16."""
    if backend == "triton":
        monkeypatch.setattr("fastpeft.kernels.prompt_gather.BLOCK_T", 16)
    problem = PromptProblem.make((2,), (0,), 41, 2, device=DEVICE, integers=True)
    for first, stop in ((33, 35), (0, 1), (40, 41), (3, 39)):
        mask = torch.zeros(1, 41, dtype=torch.int64, device=DEVICE)
        mask[:, first:stop] = 1
        moved = PromptProblem(**{**problem.__dict__, "mask": mask})
        assert_same(moved.exact(), moved.fused(backend))


@each_backend
@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64])
def test_integers_of_any_kind(backend, dtype):
    p = PromptProblem.make(device=DEVICE)
    plain = prompt_gather(p.prompts, p.prompt_ids, p.ids, p.table, None, p.mask, p.labels, backend=backend)
    small = torch.int32 if dtype == torch.bool else dtype
    ids = torch.tensor(p.prompt_ids, device=DEVICE, dtype=small)
    given = p.ids.to(small), p.table, None, p.mask.to(dtype), p.labels.to(small)
    other = prompt_gather(p.prompts, ids, *given, backend=backend)
    assert other.attention_mask.dtype == dtype
    for one, two in zip(plain, other, strict=True):
        assert torch.equal(one.double(), two.double())


@each_backend
@each_side
def test_positions_that_are_given(backend, left):
    p = PromptProblem.make(device=DEVICE)
    given = torch.randint(100, p.ids.shape, device=DEVICE)
    ids, lengths = p.prompt_ids, [len(t) for t in p.prompts]
    for positions in (given, given[:1]):
        side = "left" if left else "right"
        found = prompt_gather(
            p.prompts, ids, p.ids, p.table, None, p.mask, position_ids=positions, padding_side=side, backend=backend
        )
        x = p.table[p.ids]
        width = found.attention_mask.shape[1]
        every = positions.expand_as(given)
        wanted = reference.prompt_gather(torch.cat(p.prompts), lengths, ids, x, width, p.mask, None, every, left)
        assert torch.equal(found.position_ids, wanted[2])
        assert found.labels is None


@each_backend
def test_one_table_with_lengths(backend):
    p = PromptProblem.make(device=DEVICE, integers=True)
    table = torch.cat(p.prompts).requires_grad_()
    lengths = [len(t) for t in p.prompts]
    found = prompt_gather(
        table, p.prompt_ids, p.ids, p.table, attention_mask=p.mask, lengths=lengths, ignore_index=-5, labels=p.labels,
        backend=backend,
    )  # fmt: skip
    exact = p.exact()
    assert torch.equal(found.inputs_embeds.double(), exact["y"])
    assert torch.equal(found.labels, torch.where(exact["labels"] == -100, -5, exact["labels"]))
    (grad,) = torch.autograd.grad(found.inputs_embeds, table, p.dy)
    assert torch.equal(grad.double(), torch.cat([exact[f"dprompt{i}"] for i in range(3)]))


@each_backend
def test_a_trained_embedding_gets_the_gradient_of_torch(backend):
    p = PromptProblem.make(device=DEVICE, integers=True)
    weight = p.table.clone().requires_grad_()
    y = prompt_gather(p.prompts, p.prompt_ids, p.ids, weight, None, p.mask, backend=backend).inputs_embeds
    (grad,) = torch.autograd.grad(y, weight, p.dy)
    x = p.table[p.ids].requires_grad_()
    y = prompt_gather(p.prompts, p.prompt_ids, None, None, x, p.mask, backend=backend).inputs_embeds
    (dx,) = torch.autograd.grad(y, x, p.dy)
    assert torch.equal(grad, torch.zeros_like(weight).index_add(0, p.ids.flatten(), dx.flatten(0, 1)))


def test_check_is_green():
    rows = list(check(DEVICE))
    assert rows
    assert all(worst.ok for _, _, worst in rows)


@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
@hypothesis.given(st.data())
def test_drawn_batches(data):
    lengths = data.draw(st.lists(st.integers(0, 20), min_size=1, max_size=4))
    ids = data.draw(st.lists(st.integers(-1, len(lengths) - 1), min_size=1, max_size=5))
    problem = PromptProblem.make(
        lengths, ids, data.draw(st.integers(4, 20)), data.draw(st.integers(1, 40)), device=DEVICE,
        left=data.draw(st.booleans()), padded=data.draw(st.booleans()), embeds=data.draw(st.booleans()), integers=True,
    )  # fmt: skip
    for backend in BACKENDS:
        if REASONS[backend](problem.table, problem.prompts[0]) is None:
            assert_same(problem.exact(), problem.fused(backend))
