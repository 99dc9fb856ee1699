"""csrc/lora_linear.cu on the emulated GPU, at the edges: order of events, residency, offsets, refusals, races."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpeft.testing import integer_inputs
from tests.cuda.emulator import build
from tests.cuda.emulator.lora_linear import Guarded, Launchers

pytestmark = pytest.mark.skipif(build.missing() is not None, reason=f"nothing to emulate with: {build.missing()}")
BF16, FP16 = torch.bfloat16, torch.float16
WIDE, NARROW = 0, 1


@pytest.fixture
def gpu():
    return Launchers()


def forward(x, w, s, b):
    x, w, s, b = (t.double() for t in (x, w, s, b))
    return x @ w.T + s @ b.T


@pytest.mark.parametrize("resident", [1, 2, 3])
def test_down_whoever_is_resident(gpu, resident):
    """The machine promises three clusters and holds fewer: no block may wait for one that has not begun."""
    M, N, K, R = 700, 260, 64, 16
    operands = integer_inputs((M, K), (N, K), (R, K), (N, R), dtype=FP16)
    operands[2][:, 24:] = 0
    for seed in range(2):
        gpu.set(seed=seed, clusters=3, resident=resident)
        y, s = gpu.down(*operands, gpu.workspace(M))
        x, w, a, b = operands
        assert torch.equal(s.double(), x.double() @ a.double().T)
        assert torch.equal(y.double(), forward(x, w, s, b))


@pytest.mark.parametrize("clusters", [1, 3, 100])
def test_every_order_and_grid(gpu, clusters):
    """The same bits whatever the order of events and the number of blocks."""
    M, N, K, R = 600, 300, 328, 40
    operands = integer_inputs((M, K), (N, K), (M, R), (N, R), dtype=FP16)
    expected = forward(*operands).to(FP16)
    for seed in range(2):
        gpu.set(seed=seed, clusters=clusters)
        assert torch.equal(gpu.forward(*operands, config=NARROW), expected)


@pytest.mark.parametrize(
    ("columns", "depth", "blocks"), [(1024, 2048, 4), (1024, 1984, 2), (128, 2048, 2), (384, 64, 2)]
)
def test_long_work_has_more_clusters_than_fit(gpu, columns, depth, blocks):
    """Of eight tiles with 32 steps two clusters take four each, one after the other or wherever there is room."""
    x, w = integer_inputs((200, depth), (columns, depth), dtype=FP16)
    x[:, 64:] = 0
    none = x[:, :0], w[:, :0]
    gpu.set(clusters=1)
    y = gpu.forward(x, w, *none, config=NARROW)
    assert gpu.library.emulator_last_grid() == blocks
    assert torch.equal(y.double(), x.double() @ w.double().T)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    st.integers(1, 400), st.integers(1, 400), st.integers(1, 30), st.integers(0, 256), st.integers(0, 1), st.integers()
)
def test_any_shape(M, N, eighths, R, config, seed):
    gpu = Launchers()
    gpu.set(seed=seed % 2**32)
    operands = integer_inputs((M, 8 * eighths), (N, 8 * eighths), (M, R), (N, R), dtype=FP16, seed=seed % 2**32)
    assert torch.equal(gpu.forward(*operands, config=config).double(), forward(*operands))
    x, w, s, b = operands
    dx = gpu.backward(x, w.T.contiguous(), s, b.T.contiguous(), config=config)
    assert torch.equal(dx.double(), forward(*operands))


def test_offsets_past_31_bits(gpu):
    """Two rows 2^31 elements apart: only touched pages take memory."""
    x = torch.empty(2**31 + 64, dtype=BF16).as_strided((2, 8), (2**31, 1))
    w, a, b, values = integer_inputs((16, 8), (4, 8), (16, 4), (2, 8), dtype=BF16)
    x.copy_(values)
    y, s = gpu.down(x, w, a, b, gpu.workspace(2))
    assert torch.equal(s.double(), values.double() @ a.double().T)
    assert torch.equal(y.double(), forward(values, w, s, b))
    assert torch.equal(gpu.backward(x, w.T.contiguous(), s, b.T.contiguous()), y)


def zeros(*shapes):
    return [torch.zeros(s, dtype=BF16) for s in shapes]


def test_nothing_to_do(gpu):
    assert gpu.forward(*zeros((0, 8), (16, 8), (0, 4), (16, 4))).shape == (0, 16)
    assert gpu.forward(*zeros((5, 8), (0, 8), (5, 4), (0, 4))).shape == (5, 0)
    assert gpu.down(*zeros((0, 8), (16, 8), (4, 8), (16, 4)), gpu.workspace(0))[0].shape == (0, 16)


@pytest.mark.parametrize(
    ("says", "call"),
    [
        (
            "sums over 12 columns, expected a multiple of 8",
            lambda g: g.forward(*zeros((4, 12), (4, 12), (4, 4), (4, 4))),
        ),
        ("sums over 0 columns", lambda g: g.forward(*zeros((4, 0), (4, 0), (4, 4), (4, 4)))),
        ("sums over 20 columns", lambda g: g.backward(*zeros((4, 20), (20, 8), (4, 4), (4, 8)))),
        ("rank 257, expected at most 256", lambda g: g.forward(*zeros((4, 8), (4, 8), (4, 257), (4, 257)))),
        ("config is 2, expected 0 or 1", lambda g: g.forward(*zeros((4, 8), (4, 8), (4, 4), (4, 4)), config=2)),
        ("dropout without a seed", lambda g: g.backward(*zeros((4, 8), (8, 8), (4, 4), (4, 8)), None, 9)),
        ("threshold is 65536", lambda g: g.backward(*zeros((4, 8), (8, 8), (4, 4), (4, 8)), None, 65536)),
        ("rank 65, expected at most 64", lambda g: g.down(*zeros((4, 8), (4, 8), (65, 8), (4, 65)), g.workspace(4))),
        ("rank 0, expected at least 1", lambda g: g.down(*zeros((4, 8), (4, 8), (0, 8), (4, 0)), g.workspace(4))),
        ("no workspace", lambda g: g.down(*zeros((4, 8), (4, 8), (4, 8), (4, 4)), None)),
    ],
)
def test_refusals(gpu, says, call):
    with pytest.raises(RuntimeError, match=f"-1: lora_linear: .*{says}"):
        call(gpu)


@pytest.mark.parametrize(("rows", "left", "right"), [(3, 4, 4), (4, 8, 4)], ids=["start", "stride"])
def test_refuses_unaligned_rows(gpu, monkeypatch, rows, left, right):
    """Matrices that begin, or whose rows begin, at an odd multiple of 8 bytes."""
    monkeypatch.setattr("tests.cuda.emulator.lora_linear.ROWS", rows)
    monkeypatch.setattr("tests.cuda.emulator.lora_linear.LEFT", left)
    monkeypatch.setattr("tests.cuda.emulator.lora_linear.RIGHT", right)
    with pytest.raises(RuntimeError, match="lora_linear: x has rows that begin between multiples of 16 bytes"):
        gpu.forward(*zeros((4, 8), (4, 8), (4, 4), (4, 4)))


@pytest.mark.parametrize("name", ["x", "weight", "lora_a", "lora_b"])
def test_refuses_unaligned_memory(gpu, monkeypatch, name):
    """Whatever is read 16 bytes at a time, by TMA or not."""
    shapes = {"x": (4, 8), "weight": (4, 8), "lora_a": (8, 8), "lora_b": (4, 8)}
    operands = dict(zip(shapes, zeros(*shapes.values()), strict=True))
    monkeypatch.setattr(Guarded, "__init__", keep_placed(operands[name]))
    with pytest.raises(RuntimeError, match=f"lora_linear: {name} has rows that begin between multiples of 16 bytes"):
        gpu.down(*operands.values(), gpu.workspace(4))


def keep_placed(odd):
    """Guarded.__init__, which puts one matrix 8 bytes past a multiple of 16."""
    real = Guarded.__init__

    def init(self, value):
        real(self, value)
        if value is odd:
            self.view = self.buffer.flatten()[4 : 4 + value.numel()].view_as(value)

    return init


def test_refuses_rows_over_each_other(gpu):
    """Also where there is but one: the driver demands it of every map."""
    x = torch.zeros(16, dtype=BF16).as_strided((1, 16), (8, 1))
    with pytest.raises(RuntimeError, match="-1: lora_linear: x has a row stride of 8, expected at least 16"):
        gpu.forward(x, *zeros((4, 16), (1, 4), (4, 4)))


@pytest.mark.slow
def test_races(tmp_path):
    """Every form once under ThreadSanitizer."""
    done = build.run(build.build(build.HERE / "race.cpp", tmp_path / "race", "-g1", "-O1", "-fsanitize=thread"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")
