"""The SGLang backend's arithmetic, on stand-ins for SGLang's classes with their shapes (read in SGLang 0.5.23)."""

import types

import pytest
import torch

from fastpeft.integrations import sglang
from tests.support.backends import BACKENDS, DEVICE
from tests.support.small_sglang import RANK, SLOTS, ChunkedSgmvLoRABackend, K, Layer, LoRAMemoryPool

sglang.spread_on_load(LoRAMemoryPool)
RANKS, SCALES = (3, 0, RANK, 5), (0.5, 0.0, -2.0, 1.0)  # slot 1 is the base model's
WIDTHS = [(16,), (16, 16), (24, 8, 8), (8, 8, 16, 8)]


@pytest.fixture(autouse=True)
def _on_the_device():
    with DEVICE:
        yield


@pytest.fixture
def backend(monkeypatch):
    monkeypatch.setattr(sglang, "_sequence_lengths", lambda lengths: torch.tensor(lengths, device="cpu"))
    monkeypatch.setattr(sglang, "_LAYERS", Layer.__module__)
    return sglang.backend_class(ChunkedSgmvLoRABackend)(SLOTS, DEVICE, None)


def whole(*shape, dtype=torch.float32):
    """Small whole numbers: every sum below is exact, in any order."""
    return torch.randint(-2, 3, shape).to(dtype)


def adapter(widths, rank, dtype=torch.float32):
    """What SGLang loads: A's slices stacked, B's slices stacked."""
    weights = whole(len(widths) * rank, K, dtype=dtype), whole(sum(widths), rank, dtype=dtype)
    return types.SimpleNamespace(config=types.SimpleNamespace(r=rank), weights={"site": weights})


def load(layer, slot, uid, lora):
    LoRAMemoryPool().load_lora_weight_to_buffer(uid, slot, lora, [{"site": layer}], None, None)


def loaded(backend, widths, dtype=torch.float32):
    """A layer with an adapter in each slot but the base model's, and the adapters; NaN wherever none was loaded."""
    layer, adapters = Layer(backend, widths, dtype), {}
    layer.lora_a.fill_(float("nan"))
    layer.lora_b.fill_(float("nan"))
    for slot, rank in enumerate(RANKS):
        if rank:
            adapters[slot] = adapter(widths, rank, dtype)
            load(layer, slot, f"adapter {slot}", adapters[slot])
    return layer, adapters


def prepare(backend, lengths, slots, **mode):
    backend.prepare_lora_batch(lengths, slots, list(RANKS), list(SCALES), mode.pop("use_cuda_graph", False), **mode)


def dense(y, x, layer, adapters, lengths, slots):
    """y + scale · (x Aᵀ) Bᵀ of each request's own adapter, slice by slice, in float64."""
    y, offsets = y.double().clone(), layer.lora_offsets
    for t, slot in enumerate(slot for slot, length in zip(slots, lengths) for _ in range(length)):
        if slot in adapters:
            lora_a, lora_b = (weight.double() for weight in adapters[slot].weights["site"])
            for p, a in enumerate(lora_a.split(RANKS[slot])):
                columns = slice(offsets[p], offsets[p + 1])
                y[t, columns] += SCALES[slot] * (lora_b[columns] @ (a @ x[t].double()))
    return y


def forward(backend, layer, x, y, **kwargs):
    return backend.forward_with_base(
        layer, x, lambda: y, layer.lora_a, layer.lora_b, None, layer.lora_offsets, **kwargs
    )


BATCHES = {
    "mixed": ([2, 1, 3, 1, 2], [2, 1, 0, 3, 2]),
    "last slot": ([4], [SLOTS - 1]),
    "decode": ([1] * 6, [3, 3, 1, 0, 2, 0]),
    "base alone": ([2, 2], [1, 1]),
}


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize(("lengths", "slots"), BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("widths", WIDTHS, ids=len)
def test_forward_with_base_is_the_dense_formula(monkeypatch, backend, kernels, lengths, slots, widths):
    """Ranks and scales differ, rows of padding follow, and y has columns that belong to no slice."""
    monkeypatch.setenv("FASTPEFT_BACKEND", kernels)
    layer, adapters = loaded(backend, widths)
    prepare(backend, lengths, slots)
    rows = sum(lengths) + 3
    x, y = whole(rows, K), whole(rows, sum(widths) + 2)
    expected = dense(y, x, layer, adapters, lengths, slots)
    assert forward(backend, layer, x, y) is y
    assert torch.equal(y.double(), expected)


@pytest.mark.parametrize("base", [True, False], ids=["on the base's output", "alone"])
def test_called_without_the_base(backend, base):
    """As layers' ``apply_lora`` calls it; also in half precision."""
    for widths in ((16, 16), (24, 8, 8)):
        layer, adapters = loaded(backend, widths, torch.float16)
        lengths, slots = BATCHES["mixed"]
        prepare(backend, lengths, slots)
        x = whole(sum(lengths), K, dtype=torch.float16)
        y = whole(len(x), sum(widths), dtype=torch.float16) if base else None
        start = torch.zeros(len(x), sum(widths)) if y is None else y
        expected, offsets = (
            dense(start, x, layer, adapters, lengths, slots),
            torch.tensor(layer.lora_offsets, device="cpu"),
        )
        if len(widths) == 2:
            found = backend.run_gate_up_lora(x, layer.lora_a, layer.lora_b, offsets, base_output=y)
        else:
            found = backend.run_qkv_lora(
                x, layer.lora_a, layer.lora_b, None, 24, base_output=y, n_slices=3, output_offset_cpu=offsets
            )
        assert torch.equal(found.double(), expected)


def test_the_adapter_is_added_before_the_reduction(backend):
    layer, adapters = loaded(backend, (16,))
    lengths, slots = BATCHES["mixed"]
    prepare(backend, lengths, slots)
    x, y = whole(sum(lengths), K), whole(sum(lengths), 16)
    expected = 2 * dense(y, x, layer, adapters, lengths, slots)  # two ranks, each with the same share
    assert torch.equal(forward(backend, layer, x, y, all_reduce=lambda t: t + t).double(), expected)


@pytest.mark.parametrize("prefill", [False, True], ids=["decode", "prefill"])
def test_a_graph_reads_the_same_buffers_in_every_step(backend, prefill):
    """Captured with the base model alone, as SGLang captures, replayed with adapters and fewer tokens."""
    backend.init_decode_cuda_graph_batch_info(8, 1)
    backend.init_prefill_cuda_graph_batch_info(8, 4)
    mode = {"use_cuda_graph": not prefill, "use_prefill_cuda_graph": prefill}
    prepare(backend, [1] * 8, [1] * 8, **mode)
    captured, tables = backend.batch_info, backend.fastpeft_tables
    addresses = [t.data_ptr() for t in (*tables, captured.lora_ranks, captured.scalings)]
    assert tables[-1].item() == 8, "a launch that is skipped is not captured"
    layer, adapters = loaded(backend, (16, 16))
    for slots in ([3, 0, 1, 2, 2], [2, 3], [0] * 8):
        prepare(backend, [1] * 8, [1] * 8)  # an eager batch between, in buffers of its own
        prepare(backend, [1] * len(slots), slots, **mode)
        assert [t.data_ptr() for t in (*backend.fastpeft_tables, captured.lora_ranks, captured.scalings)] == addresses
        x, y = whole(8, K), whole(8, 32)
        expected = dense(y, x, layer, adapters, [1] * len(slots), slots)
        assert torch.equal(forward(backend, layer, x, y).double(), expected)


def test_eager_buffers_grow_and_base_batches_launch_nothing(backend, monkeypatch):
    layer, adapters = loaded(backend, (16,))
    for tokens in (3, 50, 7):
        prepare(backend, [tokens], [2])
        x, y = whole(tokens, K), whole(tokens, 16)
        expected = dense(y, x, layer, adapters, [tokens], [2])
        assert torch.equal(forward(backend, layer, x, y).double(), expected)
    prepare(backend, [2, 3], [1, 1])
    monkeypatch.setattr("fastpeft.integrations._step.multi_lora_", lambda *_: pytest.fail("launched"))
    forward(backend, layer, whole(5, K), torch.ones(5, 16))


class OtherLayer(Layer):
    """A layer with an ``apply_lora`` that is not from SGLang's layers file."""

    def apply_lora(self, base_output, x):
        raise NotImplementedError


OtherLayer.apply_lora.__module__ = "somebody.else"


@pytest.mark.parametrize(
    ("layer", "change"),
    [
        (Layer, {"kind": "embedding"}),
        (Layer, {"kind": "lm_head", "pruned_batch_info": object()}),
        (Layer, {"something_new": 1}),
        (OtherLayer, {}),
    ],
    ids=["embedding", "lm_head", "an unknown argument", "a layer with its own apply_lora"],
)
def test_what_is_not_a_plain_linear_site_is_left_to_sglang(monkeypatch, backend, layer, change):
    monkeypatch.setattr(ChunkedSgmvLoRABackend, "forward_with_base", lambda *_, **__: "SGLang's own")
    prepare(backend, [1], [0])
    assert forward(backend, layer(backend, (16,)), whole(1, K), None, **change) == "SGLang's own"


def test_shrink_alone_is_sglangs_for_one_slice_only(backend):
    assert backend.run_lora_a_sgemm(None, None) == "SGLang's own"
    with pytest.raises(NotImplementedError, match="stack_num=3, expected 1"):
        backend.run_lora_a_sgemm(None, None, stack_num=3)


def test_a_slot_that_changes_hands(backend):
    """From a high rank to a low one and back: what lies between the slices is the old adapter's, and is not read."""
    layer = Layer(backend, (16, 8))
    for rank in (RANK, 3, 1, 5, RANK):
        lora = adapter((16, 8), rank)
        load(layer, 2, "a", lora)
        prepared = [0, 0, rank, 0], [0.0, 0.0, SCALES[2], 0.0]
        backend.prepare_lora_batch([3], [2], *prepared, use_cuda_graph=False)
        x, (lora_a, lora_b) = whole(3, K), (weight.double() for weight in lora.weights["site"])
        deltas = [SCALES[2] * x.double() @ a.T @ b.T for a, b in zip(lora_a.split(rank), lora_b.split((16, 8)))]
        assert torch.equal(forward(backend, layer, x, torch.zeros(3, 24)).double(), torch.cat(deltas, 1))


def test_other_backends_keep_their_packing():
    layer, lora = Layer(types.SimpleNamespace(name="csgmv"), (16, 8)), adapter((16, 8), 3)
    load(layer, 2, "a", lora)
    assert torch.equal(layer.lora_a[2, :6], lora.weights["site"][0])


def test_wrapping_the_pool_twice_wraps_once():
    before = LoRAMemoryPool.load_lora_weight_to_buffer
    sglang.spread_on_load(LoRAMemoryPool)
    assert LoRAMemoryPool.load_lora_weight_to_buffer is before
