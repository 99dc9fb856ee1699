"""Training and decode steps are captured whole: no forbidden call, no work outside, a replay of one launch."""

import pytest
import torch

from bench.host_cases import OURS, OWN, PEFT, Case, steps
from bench.nullgpu import counted


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


@pytest.mark.parametrize(
    "case",
    [Case("block", True, dropout, adapters) for dropout in (0.0, 0.1) for adapters in ("bfloat16", "float32")]
    + [Case("block", False, dropout) for dropout in (0.0, 0.1)],
    ids=str,
)
def test_a_step_of_layers(case):
    found = steps(case)
    for way in (PEFT, OURS, OWN):
        graphs = []
        asked = counted(lambda: graphs.append(captured(found[way])))  # noqa: B023
        assert (asked.refused, asked.stray, asked.missing) == (0, 0, 0), way
        replay = counted(graphs[0].replay)
        assert (replay.graph_launches, replay.syncs) == (1, 0), way
        assert replay.launches <= 2, way  # PyTorch writes its generator's seed and offset first, where one is used
