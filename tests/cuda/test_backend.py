"""When the CUDA kernels are chosen, why not, and what an explicit request says where they cannot serve."""

import pytest
import torch

import fastpeft
from fastpeft import _backend
from fastpeft.cuda import choice
from fastpeft.cuda import lora_linear as cuda_linear
from fastpeft.ops import lora_linear, multi_lora, route
from fastpeft.ops.lora_linear import REASONS

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def linear(m=16, k=32, n=64, r=8, dtype=BF16, adapter=None):
    adapter = adapter or dtype
    shapes = ((m, k), dtype), ((n, k), dtype), ((r, k), adapter), ((n, r), adapter)
    return [torch.zeros(shape, dtype=d) for shape, d in shapes]


def test_asked_for_without_the_extension_it_says_what_is_missing():
    missing = _backend.cuda_missing()
    if missing is None:
        pytest.skip("fastpeft._C is built here")
    assert missing.startswith("fastpeft._C ")
    with pytest.raises(ValueError, match="lora_linear: backend='cuda' cannot serve this call: fastpeft._C "):
        lora_linear(*linear(), backend="cuda")
    with pytest.raises(ValueError, match="multi_lora: backend='cuda' cannot serve this call: fastpeft._C "):
        x, _, a, b = linear()
        multi_lora(x, a[None], b[None], torch.zeros(16, dtype=torch.int32), torch.ones(1), backend="cuda")


@pytest.fixture
def built(monkeypatch):
    """As if fastpeft._C were built; the devices are the machine's own."""
    monkeypatch.setattr(_backend, "cuda_missing", lambda: None)


@pytest.fixture
def hopper(built, monkeypatch):
    """As if tensors on the CPU lay on an sm_90."""
    monkeypatch.setattr(_backend, "cuda_reason", lambda x, expected, fits: None if fits(90) else expected)
    monkeypatch.setattr(_backend, "triton_lora_reason", lambda *_: None)


def test_tensors_on_the_cpu(built):
    with pytest.raises(ValueError, match="device cpu \\(the kernels of fastpeft._C run on CUDA devices\\)"):
        lora_linear(*linear(), backend="cuda")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, None),
        ({"dtype": FP16}, None),
        ({"dtype": FP32}, "x in torch.float32"),
        ({"adapter": FP32}, "adapters in torch.float32"),
        ({"r": 12}, "ranks \\[12\\], expected multiples of 8"),
        ({"r": 264}, "add up to 256"),
        ({"n": 60}, "weight has shape \\[\\[60, 32\\]\\], expected multiples of 8"),
        ({"k": 36}, "weight has shape \\[\\[64, 36\\]\\], expected multiples of 8"),
    ],
    ids=str,
)
def test_what_lora_linear_serves(hopper, change, said):
    x, weight, a, b = linear(**change)
    assert (REASONS["cuda"](x, [a], [weight], [b]) is None) == (said is None)
    if said is not None:
        with pytest.raises(ValueError, match=said):
            lora_linear(x, weight, a, b, backend="cuda")


def test_lora_linear_wants_rows_that_tma_can_read(hopper):
    x, weight, a, b = linear()
    wide = torch.zeros(16, 33, dtype=BF16)
    assert "x has strides (33, 1)" in REASONS["cuda"](wide[:, :32], [a], [weight], [b])
    assert "starts at element 1" in REASONS["cuda"](torch.zeros(16, 40, dtype=BF16)[:, 1:33], [a], [weight], [b])
    for flat in (torch.zeros(4, 3, 64, dtype=BF16)[..., :32], torch.zeros(3, 4, 32, dtype=BF16).transpose(0, 1)):
        assert REASONS["cuda"](flat, [a], [weight], [b]) is None  # rows at equal distances, and rows that are copied
    odd = torch.zeros(2, 3, 40, dtype=BF16)[..., 4:36]
    assert "x has strides (40, 1) and starts at element 4" in REASONS["cuda"](odd, [a], [weight], [b])
    with pytest.raises(ValueError, match=r"x has strides \(40, 1\)"):
        lora_linear(odd, weight, a, b, backend="cuda")
    assert "weight has strides (1, 64)" in REASONS["cuda"](x, [a], [torch.zeros(32, 64, dtype=BF16).T], [b])
    assert "lora_b has strides (1, 64)" in REASONS["cuda"](x, [a], [weight], [torch.zeros(8, 64, dtype=BF16).T])
    assert "no weight" in REASONS["cuda"](x, [a], [None], [b])


def test_memory_of_another_library_may_begin_anywhere(hopper):
    """Its first element is element 0 all the same."""
    x, weight, a, b = linear()
    memory = bytearray(x.numel() * 2 + 16)
    past = (8 - torch.frombuffer(memory, dtype=torch.uint8).data_ptr()) % 16
    odd = torch.frombuffer(memory, dtype=BF16, count=x.numel(), offset=past).view_as(x)
    said = REASONS["cuda"](odd, [a], [weight], [b])
    assert "x has strides (32, 1) and starts at element 0 of its memory, 8 bytes past a multiple of 16" in said
    assert REASONS["cuda"](x.to("meta"), [a], [weight], [b]) is None


def test_unasked_it_is_taken_only_where_it_was_measured(hopper, monkeypatch):
    """The table ships empty: no CUDA kernel has been timed."""
    assert choice.TABLE == ()
    x, weight, a, b = linear()
    facts = x, [a], [weight], [b]
    assert "choice.py is empty" in _backend._against("cuda", REASONS, facts)
    bucket = choice.Measured("lora_linear", 90, (8, 32), 32, 64, 16, "a row")
    monkeypatch.setattr(choice, "TABLE", (bucket,))
    assert _backend._against("cuda", REASONS, facts) is None


def test_a_bucket_of_the_table():
    table = (choice.Measured("lora_linear", 90, (1024, 4096), 4096, 14336, 64, "a row"),)
    assert choice.measured("lora_linear", 90, 1024, 4096, 14336, 64, table) is table[0]
    for other in (
        ("multi_lora", 90, 1024, 4096, 14336, 64),
        ("lora_linear", 100, 1024, 4096, 14336, 64),
        ("lora_linear", 90, 1023, 4096, 14336, 64),
        ("lora_linear", 90, 4097, 4096, 14336, 64),
        ("lora_linear", 90, 1024, 4104, 14336, 64),
        ("lora_linear", 90, 1024, 4096, 4096, 64),
        ("lora_linear", 90, 1024, 4096, 14336, 65),
    ):
        assert choice.measured(*other, table) is None


def test_explain_says_why_not(hopper):
    said = str(fastpeft.explain("lora_linear", *linear(dtype=FP32)))
    assert "lora_linear: served by reference" in said
    assert "\n  cuda: x in torch.float32" in said
    said = str(fastpeft.explain("lora_linear", *linear()))
    assert "\n  cuda: can serve this call, if asked to: no measurement says that it is faster" in said


def test_explain_names_the_kernel_that_is_asked_for(hopper):
    said = str(fastpeft.explain("lora_linear", *linear(), backend="cuda"))
    assert "lora_linear: served by cuda" in said
    assert "Config(tile='128x128', inside=False)" in said


def test_the_tiles_that_are_over_first():
    """66 clusters at a time; a narrow tile takes half as long as a wide one, which is taken where it costs nothing."""
    wide, narrow = cuda_linear.TILES
    chosen = {m: cuda_linear.config(m, 4096).tile for m in (1, 256, 512, 1024, 1536, 2048, 4096, 8192)}
    assert chosen == dict.fromkeys((1, 256, 512, 1536), narrow) | dict.fromkeys((1024, 2048, 4096, 8192), wide)
    assert cuda_linear.config(1, 8, inside=True) == cuda_linear.Config(wide, True)


def test_the_routing_that_csrc_reads_is_made_by_triton(built):
    said = str(fastpeft.explain("route", torch.zeros(4, dtype=torch.int32)))
    assert "csrc/ has no kernel for it" in said or "served by reference" in said
    if _backend.triton_reason(torch.device("cpu")) is None:
        slots = torch.tensor([1, 0, -1, 1], dtype=torch.int32)
        asked, wanted = route(slots, 2, backend="cuda"), route(slots, 2, backend="reference")
        assert all(map(torch.equal, asked[:3], wanted[:3]))
