"""The vLLM plug-in's arithmetic, on stand-ins for vLLM's classes with their shapes (read in vLLM 0.33.0)."""

import types

import pytest
import torch
import torch._dynamo.testing

from fastpeft.integrations import _vllm_ranks, vllm
from fastpeft.integrations._step import StepRouting, routing_of
from fastpeft.ops import route
from tests.support.backends import BACKENDS, DEVICE
from tests.support.small_vllm import (
    RANK,
    SLOTS,
    BaseLinearLayerWithLoRA,
    K,
    MergedColumnParallelLinearWithLoRA,
    PunicaWrapperCPU,
    PunicaWrapperGPU,
)

_vllm_ranks.record_ranks(BaseLinearLayerWithLoRA)


class Unwrapped(BaseLinearLayerWithLoRA):
    """A layer of somebody else's, defined after the plug-in ran."""

    def set_lora(self, index, lora_a, lora_b):
        self.reset_lora(index)
        self.lora_a_stacked[0][index, 0].copy_(lora_a)
        self.lora_b_stacked[0][index, 0].copy_(lora_b)


WRAPPERS = {"GPU": (vllm._Fast, PunicaWrapperGPU), "CPU": (vllm._FastCPU, PunicaWrapperCPU)}


@pytest.fixture(autouse=True)
def _on_the_device():
    with DEVICE:
        yield


def wrapper(kind="GPU"):
    fast = type("FastPunicaWrapper", WRAPPERS[kind], {})
    return fast(40, 8, DEVICE, lora_config=types.SimpleNamespace(max_loras=SLOTS))


def whole(*shape, dtype=torch.float32):
    """Small whole numbers: every sum below is exact, in any order."""
    return torch.randint(-2, 3, shape).to(dtype)


def loaded(widths, ranks, dtype=torch.float32):
    """A layer with an adapter of ``ranks[slot]`` in each slot (0: none), and NaN wherever nothing may be read."""
    layer = MergedColumnParallelLinearWithLoRA(widths, dtype)
    for slot, rank in enumerate(ranks):
        if rank:
            # The last row of A is not 0, as no trained one is: the rank is seen there.
            lora_a = [whole(rank, K).index_fill_(0, torch.tensor(rank - 1), 1.0) for _ in widths]
            layer.set_lora(slot, lora_a, [whole(n, rank) for n in widths])
        for a, b in zip(layer.lora_a_stacked, layer.lora_b_stacked):
            a[slot, :, rank:] = b[slot, ..., rank:] = float("nan")
    return layer


def dense(y, x, layer, slots, ranks, scale=1.0):
    """vLLM's own description of add_lora_linear, token by token, in float64."""
    y, start = y.double().clone(), 0
    for a, b, width in zip(layer.lora_a_stacked, layer.lora_b_stacked, layer.output_slices):
        for t, slot in enumerate(slots):
            if slot >= 0:
                rank = ranks[slot]
                s = a[slot, 0, :rank].double() @ x[t].double() * scale
                y[t, start : start + width] += b[slot, 0, :, :rank].double() @ s
        start += width
    return y


def apply(fast, layer, y, x, scale=1.0, **kwargs):
    operands = layer.lora_a_stacked, layer.lora_b_stacked, scale, layer.output_slices
    return fast.add_lora_linear(y, x, *operands, **kwargs)


MAPPINGS = {
    "mixed": [3, 0, -1, 2, 2, 3, -1, 0, 3],
    "last slot": [SLOTS - 1] * 5,
    "one token": [1],
    "first none": [-1, -1, 2],
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mapping", MAPPINGS.values(), ids=MAPPINGS)
@pytest.mark.parametrize("widths", [(16,), (16, 16), (24, 8, 8), (8, 8, 16, 8), (8,) * 6], ids=len)
def test_add_lora_linear_is_the_dense_formula(monkeypatch, backend, mapping, widths):
    """Ranks differ, a rank is full, padding rows follow, and y has columns that belong to no slice."""
    monkeypatch.setenv("FASTPEFT_BACKEND", backend)
    ranks = (3, 1, RANK, 5)
    fast, layer = wrapper(), loaded(widths, ranks)
    fast.update_metadata(mapping, [], SLOTS + 1, 0)
    x, y = whole(len(mapping) + 3, K), whole(len(mapping) + 3, sum(widths) + 2)
    expected = dense(y, x, layer, mapping, ranks)
    assert apply(fast, layer, y, x) is None
    assert torch.equal(y.double(), expected)


@pytest.mark.parametrize("kind", WRAPPERS)
def test_scale_dtype_and_three_dimensions(kind):
    ranks, mapping = (2, RANK, 0, 4), [0, 1, 3, 3]
    fast, layer = wrapper(kind), loaded((16, 8), ranks, torch.float16)
    fast.update_metadata(mapping, [], SLOTS + 1, 0)
    x, y = whole(1, 4, K, dtype=torch.float16), torch.zeros(1, 4, 24, dtype=torch.float16)
    expected = dense(y[0], x[0], layer, mapping, ranks, scale=0.5)
    apply(fast, layer, y, x, scale=0.5)
    assert torch.equal(y[0].double(), expected)


def test_add_inputs_false_starts_from_zero():
    ranks, mapping = (2, RANK, 1, 4), [0, 1, 3, 3]
    fast, layer = wrapper(), loaded((16,), ranks)
    fast.update_metadata(mapping, [], SLOTS + 1, 0)
    x, y = whole(4, K), torch.full((4, 16), 7.0)
    apply(fast, layer, y, x, add_inputs=False)
    assert torch.equal(y.double(), dense(torch.zeros(4, 16), x, layer, mapping, ranks))


@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_step_without_adapters_launches_nothing(monkeypatch, kind):
    fast, layer = wrapper(kind), loaded((16,), (2, 2, 2, 2))
    fast.update_metadata([-1] * 5, [], SLOTS + 1, 0)
    monkeypatch.setattr("fastpeft.integrations._step.multi_lora_", lambda *_: pytest.fail("launched"))
    y = torch.ones(5, 16)
    apply(fast, layer, y, whole(5, K))
    assert torch.equal(y, torch.ones(5, 16))


def test_fewer_rows_than_the_step_has_tokens_is_an_error():
    fast, layer = wrapper(), loaded((16,), (2, 2, 2, 2))
    fast.update_metadata([0, 1, 2], [], SLOTS + 1, 0)
    with pytest.raises(ValueError, match=r"vllm_lora_: x has 2 rows, expected the step's 3 tokens"):
        apply(fast, layer, torch.zeros(2, 16), whole(2, K))


@pytest.mark.parametrize(
    "change",
    [
        {"y": torch.zeros(3, 16, dtype=torch.float64)},
        {"x": torch.zeros(3, K, dtype=torch.bfloat16)},
        {"output_slices": (8, 8)},
        {"lora_a_stacked": (torch.zeros(SLOTS + 1, 1, RANK, K),)},
        {"lora_a_stacked": (torch.zeros(SLOTS, 1, RANK // 2, K),)},
        {"buffer": torch.zeros(1, 3, RANK)},
    ],
    ids=["y in another dtype", "x in another dtype", "slices", "slots", "A shards of the rank", "a buffer"],
)
def test_what_the_op_does_not_serve_is_left_to_vllm(change):
    fast, layer = wrapper(), loaded((16,), (2, 2, 2, 2))
    fast.update_metadata([0, 1, 2], [], SLOTS + 1, 0)
    operands = {"y": torch.zeros(3, 16), "x": torch.zeros(3, K), "scale": 1.0, "output_slices": (16,)}
    stacked = {"lora_a_stacked": layer.lora_a_stacked, "lora_b_stacked": layer.lora_b_stacked}
    assert fast.add_lora_linear(**(operands | stacked | change)) == "vLLM's own"


@pytest.mark.parametrize(("max_tokens", "slots"), [(40, 4), (700, 3), (2000, 90)])
def test_the_step_routing_is_the_routing_of_every_padded_size(max_tokens, slots):
    """Also after a longer step: nothing of it remains. The buffers never move, as CUDA graphs need it."""
    step = StepRouting(max_tokens, slots, DEVICE)
    addresses = [table.data_ptr() for table in step.tables]
    for tokens in (max_tokens, max_tokens // 2, 7, 0, 520 if max_tokens > 520 else 1):
        mapping = torch.randint(-1, slots, (tokens,), dtype=torch.int32)
        step.update(mapping)
        for padded in {tokens, min(tokens + 1, max_tokens), max_tokens, max(tokens, min(512, max_tokens))}:
            full = torch.cat([mapping, torch.full((padded - tokens,), -1, dtype=torch.int32)])
            expected, found = route(full, slots), routing_of(step.tables, padded)
            assert all(torch.equal(a, b) for a, b in zip(expected[:3], found[:3], strict=True)), (tokens, padded)
            assert expected[3:] == found[3:]
    assert [table.data_ptr() for table in step.tables] == addresses


def test_compiled_once_for_every_batch_and_mapping():
    """As vLLM compiles a model: the whole graph, any number of rows; the mapping is not part of the graph."""
    ranks = (3, 1, RANK, 5)
    fast, layer = wrapper(), loaded((16, 8), ranks)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, dynamic=False, backend=counter)
    def forward(x, base):
        y = x @ base
        fast.add_lora_linear(y, x, layer.lora_a_stacked, layer.lora_b_stacked, 1.0, layer.output_slices)
        return y * 2

    base = whole(K, 24)
    for mapping in ([0, 3, -1, 2], [1, 1, 0, 3, 2, -1, 2], [3, 3, 3, 0]):
        fast.update_metadata(mapping, [], SLOTS + 1, 0)
        x = whole(len(mapping) + 2, K)
        torch._dynamo.mark_dynamic(x, 0)
        with torch.no_grad():
            found = forward(x, base)
        assert torch.equal(found.double(), 2 * dense(x @ base, x, layer, mapping, ranks))
    assert counter.frame_count == 1


def ranks_of(layer):
    return _vllm_ranks.ranks_of(layer.lora_a_stacked[0]).tolist()


def test_ranks_follow_the_adapters():
    layer = MergedColumnParallelLinearWithLoRA((16, 8))
    layer.set_lora(1, [torch.ones(3, K), None], [torch.ones(16, 3), None])
    layer.set_lora(3, [torch.ones(RANK, K), torch.ones(2, K)], [torch.ones(16, RANK), torch.ones(8, 2)])
    assert ranks_of(layer) == [[RANK, 3, RANK, RANK], [RANK, 0, RANK, 2]]
    table = _vllm_ranks.ranks_of(layer.lora_a_stacked[0])
    layer.set_lora(1, [torch.ones(1, K), torch.ones(4, K)], [torch.ones(16, 1), torch.ones(8, 4)])
    layer.reset_lora(3)
    assert ranks_of(layer) == [[RANK, 1, RANK, 0], [RANK, 4, RANK, 0]]
    assert _vllm_ranks.ranks_of(layer.lora_a_stacked[0]) is table, "a captured graph reads the first table"


def test_a_row_of_zeros_inside_of_an_adapter_counts():
    layer, lora_a = BaseLinearLayerWithLoRA(), torch.ones(4, K)
    lora_a[1] = 0
    layer.set_lora(0, lora_a, torch.ones(16, 4))
    assert ranks_of(layer) == [[4, RANK, RANK, RANK]]


def test_an_unknown_layer_counts_every_rank():
    """Its adapters are served in full: a table that nobody narrowed says R."""
    layer = Unwrapped()
    layer.set_lora(2, torch.ones(RANK, K), torch.ones(16, RANK))
    fast = wrapper()
    fast.update_metadata([2], [], SLOTS + 1, 0)
    y = torch.zeros(1, 16)
    apply(fast, layer, y, torch.ones(1, K))
    assert torch.equal(y, torch.full((1, 16), float(RANK * K)))


def test_wrapping_twice_wraps_once():
    before = BaseLinearLayerWithLoRA.set_lora, MergedColumnParallelLinearWithLoRA.set_lora
    _vllm_ranks.record_ranks(BaseLinearLayerWithLoRA)
    assert (BaseLinearLayerWithLoRA.set_lora, MergedColumnParallelLinearWithLoRA.set_lora) == before


def test_ranks_go_with_their_layer():
    layer = BaseLinearLayerWithLoRA()
    layer.set_lora(0, torch.ones(2, K), torch.ones(16, 2))
    address = layer.lora_a_stacked[0].data_ptr()
    assert address in _vllm_ranks._TABLES
    del layer
    assert address not in _vllm_ranks._TABLES


def test_ranks_noted_during_a_step_change_between_steps():
    """Steps are in inference mode, and an adapter that is loaded over HTTP is not."""
    layer = BaseLinearLayerWithLoRA()
    with torch.inference_mode():
        layer.set_lora(0, torch.ones(2, K), torch.ones(16, 2))
    layer.set_lora(0, torch.ones(3, K), torch.ones(16, 3))
    assert ranks_of(layer) == [[3, RANK, RANK, RANK]]
