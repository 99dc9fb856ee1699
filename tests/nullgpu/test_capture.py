"""Training and decode steps are captured whole: no forbidden call, no work outside, a replay of one launch."""

import re
from pathlib import Path

import pytest
import torch

import fastpeft
from bench import host_cases
from bench.host_cases import OURS, OWN, PEFT, Case
from bench.nullgpu import counted, reads_zero
from tests.support.device_steps import DROP, METHODS, OPS, ids
from tests.support.models import llama


@pytest.fixture(autouse=True)
def _zeros():
    """What the host reads is zero, rather than what lay in the memory before."""
    with reads_zero():
        yield


def captured(step) -> torch.cuda.CUDAGraph:
    """The graph of a step, after three of it on a side stream, as PyTorch's documentation has it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def test_a_turn_of_the_batcher_replays_its_step():
    """One graph for all steps of so many rows, whichever adapters they have; no pageable copy, one wait."""
    bank = host_cases._bank()
    batcher = fastpeft.serving.Batcher(bank, max_rows=host_cases.SERVED)
    names = host_cases._names()
    requests = [batcher.submit([1, 2, 3, 4], adapter=name, max_new_tokens=12) for name in names]
    for _ in range(3):
        batcher._turn()
    assert "decoding in CUDA graphs" in batcher.explain()
    asked = counted(batcher._turn)
    assert (asked.graph_launches, asked.syncs, asked.pageable, asked.refused, asked.missing) == (1, 1, 0, 0, 0)
    assert asked.launches < 8  # of the choice of tokens
    while not all(request.done for request in requests):
        batcher._turn()
    graphs = len(batcher._rows._captured._graphs)
    others = [batcher.submit([1, 2, 3, 4], adapter=name, max_new_tokens=12) for name in (None, *names[1:])]
    for _ in range(3):
        batcher._turn()
    assert counted(batcher._turn).graph_launches == 1
    assert len(batcher._rows._captured._graphs) == graphs
    batcher._rows.clear("cancelled")
    assert all(request.done for request in others)


def assert_captured(step) -> None:
    graphs = []
    asked = counted(lambda: graphs.append(captured(step)))
    assert (asked.refused, asked.stray, asked.missing) == (0, 0, 0)
    replay = counted(graphs[0].replay)
    assert (replay.graph_launches, replay.syncs) == (1, 0)
    assert replay.launches <= 2  # PyTorch writes its generator's seed and offset first, where one is used


@pytest.mark.parametrize(
    "case",
    [Case("block", True, dropout, adapters) for dropout in (0.0, 0.1) for adapters in ("bfloat16", "float32")]
    + [Case("block", False, dropout) for dropout in (0.0, 0.1)],
    ids=str,
)
def test_a_step_of_layers(case):
    found = host_cases.steps(case)
    for way in (PEFT, OURS, OWN):
        assert_captured(found[way])


@pytest.mark.parametrize("adapters", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("op", OPS)
def test_a_step_of_an_op(op, dropout, adapters):
    if dropout and op not in DROP:
        pytest.skip(f"{op} drops nothing")
    assert_captured(OPS[op](dropout, adapters))


def training(model, **batch):
    """A step of a model with its optimizer, as docs/host.md has it."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, capturable=True)

    def step():
        optimizer.zero_grad(set_to_none=False)
        model(**batch).loss.backward()
        optimizer.step()

    return step


def test_the_documented_step():
    """The example of docs/host.md replays a graph for each of its batches, and waits for none."""
    page = (Path(__file__).parents[2] / "docs/host.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page.partition("## A training step in a CUDA graph")[2], re.S)
    asked = counted(lambda: exec(compile(example, "docs/host.md", "exec"), {}))
    assert (asked.graph_launches, asked.refused, asked.stray, asked.missing) == (10, 0, 0, 0)


BATCH = {"input_ids": (2, 8), "labels": (2, 8)}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("method", METHODS)
def test_a_training_step(method, dropout, checkpointing):
    model = llama(layers=2).cuda().bfloat16()
    fastpeft.attach(model, METHODS[method](dropout))
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_captured(training(model, **{name: ids(*sizes) for name, sizes in BATCH.items()}))


@pytest.mark.parametrize("method", METHODS)
def test_a_decode_step(method):
    """With a cache of fixed length, whose position a replay counts on."""
    import transformers

    model = llama(layers=2).cuda().bfloat16().eval()
    fastpeft.attach(model, METHODS[method](0.0))
    cache = transformers.StaticCache(model.config, max_cache_len=32)
    with torch.no_grad():
        model(ids(2, 4), past_key_values=cache, use_cache=True)

        def step():
            return model(ids_of_step, past_key_values=cache, use_cache=True)

        ids_of_step = ids(2, 1)
        assert_captured(step)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("op", OPS)
def test_reduce_overhead(op, dropout):
    """torch.compile captures forward and backward by itself; calls after the first few replay."""
    if dropout and op not in DROP:
        pytest.skip(f"{op} drops nothing")
    torch._dynamo.reset()
    step = torch.compile(OPS[op](dropout, torch.float32), mode="reduce-overhead")
    for _ in range(6):
        torch.compiler.cudagraph_mark_step_begin()
        step()
    torch.compiler.cudagraph_mark_step_begin()
    asked = counted(step)
    assert (asked.refused, asked.stray, asked.missing, asked.syncs) == (0, 0, 0, 0)
    assert asked.graph_launches > 0
