"""multi_lora's forward by the host extension on a CPU: right, for any strides, and the same bits in any batch."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastpeft import _plan
from fastpeft.ops import multi_lora_, multi_lora_shared, route
from fastpeft.testing import MultiLoraProblem
from fastpeft.testing.accuracy import assert_no_worse
from tests.support import host_extension
from tests.support.backends import BF16, FP16, FP32, FP64, TRAINING
from tests.support.exactness import assert_exact

ROOT = Path(__file__).parents[3]
DTYPES = pytest.mark.parametrize(("dtype", "adapter"), [*TRAINING, (FP64, FP64)], ids=str)


@pytest.fixture(autouse=True)
def _extension(monkeypatch):
    """It serves every forward here: PyTorch's operators would be called for groups."""
    host_extension.loaded()
    monkeypatch.setattr(sys.modules["fastpeft.reference.multi_lora"], "groups_of", None)


def problem(dtype=FP32, adapter=None, tokens=150, outs=(45, 300, 16), ranks=(12, 17, 4), k=301, **options):
    return MultiLoraProblem.make(tokens, k, outs, ranks, 3, dtype, adapter, **options)


def outputs(p, index=slice(None), tile=None):
    x, ys = p.x[index], [y[index] for y in p.ys]
    routing = route(p.token_slots[index], 3, tile, "reference")
    return multi_lora_shared(x, p.lora_as, p.lora_bs, routing, p.scales, p.ranks, ys, "reference")


def in_place(p, ys=None, x=None, lora_as=None, lora_bs=None):
    ys = [y.clone() for y in p.ys] if ys is None else ys
    tables = p.lora_as if lora_as is None else lora_as, p.lora_bs if lora_bs is None else lora_bs
    routing = route(p.token_slots, 3, backend="reference")
    multi_lora_(ys, p.x if x is None else x, *map(list, tables), routing, p.scales, p.ranks, "reference")
    return ys


def expected(p):
    return [value for name, value in p.exact().items() if name.startswith("y")]


@DTYPES
@pytest.mark.parametrize("tokens", [1, 2, 5, 150])
def test_integers_are_exact(dtype, adapter, tokens):
    p = problem(dtype, adapter, tokens, integers=True)
    for found in (outputs(p), in_place(p)):
        assert all(torch.equal(y.double(), wanted) for y, wanted in zip(found, expected(p), strict=True))


@pytest.mark.parametrize(("dtype", "adapter"), TRAINING, ids=str)
def test_no_less_accurate_than_pytorch(dtype, adapter):
    p = problem(dtype, adapter, 400)
    eager = p.eager()
    for p_, (found, wanted) in enumerate(zip(outputs(p), expected(p), strict=True)):
        assert_no_worse(found, eager[f"y{p_}"], wanted, f"y{p_}")


@DTYPES
@pytest.mark.parametrize("threads", [1, 2])
def test_a_token_has_the_same_bits_in_any_batch(dtype, adapter, threads):
    """Alone, among few, among many; in place or not; NaN and infinity in other rows included."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        p = problem(dtype, adapter)
        whole = outputs(p)
        for index in ([0], [70], [149], [149, 3, 70, 8], list(range(1, 150, 2))):
            assert all(torch.equal(few, every[index]) for few, every in zip(outputs(p, index), whole, strict=True))
        assert all(map(torch.equal, in_place(p), whole))
        assert all(map(torch.equal, outputs(p, tile=64), whole))
        x = p.x.clone()
        x[:70], x[71:] = torch.nan, torch.inf
        dirty = in_place(p, x=x)
        assert all(torch.equal(found[70], clean[70]) for found, clean in zip(dirty, whole, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_strides_change_no_bit(dtype):
    p = problem(dtype)
    whole = outputs(p)
    turned = [b.mT.contiguous().mT for b in p.lora_bs]
    gaps = [torch.stack([a, a], -1)[..., 0] for a in p.lora_as]
    for given in (
        {"lora_bs": turned},
        {"lora_as": gaps},
        {"lora_as": [a.mT.contiguous().mT for a in p.lora_as]},
        {"x": p.x.T.contiguous().T},
        {"ys": [y.T.contiguous().T for y in p.ys]},
        {"ys": [torch.stack([y, y], -1)[..., 1] for y in p.ys]},
    ):
        assert all(map(torch.equal, in_place(p, **given), whole)), list(given)


@pytest.mark.parametrize("vectors", ["default", "avx2", "avx512"])
def test_every_width_of_vectors(vectors):
    """Where the processor has none so wide, PyTorch says so, and it is a narrower one that is tested."""
    program = """
import torch
from fastpeft import _host
from fastpeft.testing import MultiLoraProblem
from tests.support.exactness import assert_exact
_host.load()
for tokens in (1, 3, 70):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        problem = MultiLoraProblem.make(tokens, 301, (45, 300), (12, 17), 3, dtype, integers=True)
        assert_exact(problem, "reference")
print(torch.backends.cpu.get_cpu_capability())
"""
    environment = os.environ | {"ATEN_CPU_CAPABILITY": vectors, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert vectors == "avx512" or done.stdout.strip().lower() == vectors


def test_without_an_extension_pytorchs_operators_serve(monkeypatch):
    module = sys.modules["fastpeft.reference.multi_lora"]
    monkeypatch.undo()
    monkeypatch.setattr(module, "one_pass", lambda *_: None)
    for dtype, adapter in (*TRAINING, (FP64, FP64)):
        p = problem(dtype, adapter, integers=True)
        assert_exact(p, "reference")
        assert all(torch.equal(y.double(), wanted) for y, wanted in zip(in_place(p), expected(p), strict=True))


@pytest.mark.parametrize("ranks", [None, 0, 99], ids=str)
def test_ranks_that_are_absent_0_or_too_large(ranks):
    p = problem(integers=True)
    clean = [t.nan_to_num() for t in p.lora_as], [t.nan_to_num() for t in p.lora_bs]
    table = None if ranks is None else torch.full_like(p.ranks, ranks)
    ys = [y.clone() for y in p.ys]
    multi_lora_(ys, p.x, *clean, p.token_slots, p.scales, table, "reference")
    full = torch.tensor([12, 17, 4], dtype=torch.int32)[:, None].expand(3, 3)
    p = replace(p, lora_as=tuple(clean[0]), lora_bs=tuple(clean[1]), ranks=full)
    wanted = [y.double() for y in p.ys] if ranks == 0 else expected(p)
    assert all(torch.equal(y.double(), w) for y, w in zip(ys, wanted, strict=True))


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("starts", [0, 4, 3, 6], "to the places 4 to 3 of 6"),
        ("starts", [0, 2, 3, 7], "to the places 3 to 7 of 6"),
        ("order", [0, 1, 2, 3, 4, 6], "to token 6 of 6"),
        ("order", [0, 1, -1, 3, 4, 5], "to token -1 of 6"),
    ],
)
def test_a_routing_that_leads_outside_is_refused(name, values, message):
    p = problem(tokens=6)
    routing = route(torch.tensor([0, 1, 2, 0, 1, 2]), 3)._replace(**{name: torch.tensor(values, dtype=torch.int32)})
    ys = [y.clone() for y in p.ys]
    with pytest.raises(RuntimeError, match=f"multi_lora: token_slots was routed {message}"):
        multi_lora_(ys, p.x, list(p.lora_as), list(p.lora_bs), routing, p.scales, p.ranks, "reference")
    assert all(map(torch.equal, ys, p.ys))


@pytest.mark.parametrize("way", host_extension.WAYS)
def test_calls_in_place_that_repeat_are_plans(way):
    with host_extension.serves(way), torch.no_grad():
        plans = sys.modules["fastpeft.ops.multi_lora"]._planned
        _plan.refusals.clear()
        for seed in range(4):
            p = problem(seed=seed, tokens=9)
            assert all(map(torch.equal, in_place(p), outputs(p)))
        assert plans.plans.plans >= 1
        assert not _plan.refusals
