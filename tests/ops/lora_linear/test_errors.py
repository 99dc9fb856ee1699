"""lora_linear's bad calls: each a clear error before anything is computed; and which backend serves."""

import math

import pytest
import torch

import fastpeft
from fastpeft.ops import lora_linear, lora_linear_shared
from fastpeft.ops.lora_linear import MAX_RANK, REASONS
from tests.support.backends import BACKENDS, DEVICE, FP16, FP32, FP64


def operands(rows=3, k=8, n=6, r=4, dtype=FP32, adapter=None):
    a_dtype = adapter or dtype
    new = {"device": DEVICE, "dtype": dtype}
    return {
        "x": torch.ones(rows, k, **new),
        "weight": torch.ones(n, k, **new),
        "lora_a": torch.ones(r, k, device=DEVICE, dtype=a_dtype),
        "lora_b": torch.ones(n, r, device=DEVICE, dtype=a_dtype),
        "bias": torch.ones(n, **new),
    }


t = torch.ones
CASES = {
    # argument: (value, error, what the message says)
    "x is a list": ("x", [1.0], TypeError, r"x is a list of 1, expected a tensor \[..., K\]"),
    "x is a scalar": ("x", torch.tensor(1.0), TypeError, "x is a scalar, expected a tensor"),
    "x is of integers": ("x", t(3, 8, dtype=torch.int64), TypeError, "x has dtype torch.int64, expected a floating"),
    "weight's K": ("weight", t(6, 7), ValueError, "weight has K=7, expected K=8"),
    "weight's dimensions": ("weight", t(6), ValueError, r"weight has shape \[6\], expected \[N, K\]"),
    "weight is a number": ("weight", 3, TypeError, r"weight is 3 \(int\), expected a tensor \[N, K\]"),
    "weight's dtype": ("weight", t(6, 8, dtype=FP16), TypeError, "weight has dtype torch.float16, expected"),
    "lora_a's K": ("lora_a", t(4, 9), ValueError, "lora_a has K=9, expected K=8"),
    "lora_a's rank": ("lora_a", t(5, 8), ValueError, "lora_b has r=4, expected r=5"),
    "lora_a's dimensions": ("lora_a", t(1, 4, 8), ValueError, r"lora_a has shape \[1, 4, 8\], expected \[r, K\]"),
    "lora_a's dtype": ("lora_a", t(4, 8, dtype=FP16), TypeError, "lora_a has dtype torch.float16, expected"),
    "lora_a is None": ("lora_a", None, TypeError, "lora_a is None, expected a tensor"),
    "lora_b's N": ("lora_b", t(7, 4), ValueError, "lora_b has N=7, expected N=6"),
    "lora_b's dtype": ("lora_b", t(6, 4, dtype=FP64), TypeError, "lora_b has dtype torch.float64, expected"),
    "lora_b is transposed": ("lora_b", t(4, 6), ValueError, "lora_b has N=4, expected N=6"),
    "bias's N": ("bias", t(7), ValueError, "bias has N=7, expected N=6"),
    "bias's dimensions": ("bias", t(1, 6), ValueError, r"bias has shape \[1, 6\], expected \[N\]"),
    "bias's dtype": ("bias", t(6, dtype=FP16), TypeError, "bias has dtype torch.float16, expected torch.float32"),
    "scale is NaN": ("scale", math.nan, ValueError, "scale is nan, expected a finite number"),
    "scale is infinite": ("scale", math.inf, ValueError, "scale is inf, expected a finite number"),
    "scale is a word": ("scale", "2", ValueError, r"scale is '2' \(str\), expected a finite number"),
    "dropout is 1": ("dropout", 1.0, ValueError, r"dropout is 1.0, expected a number in \[0, 1\)"),
    "dropout is negative": ("dropout", -0.1, ValueError, "dropout is -0.1, expected a number in"),
    "dropout is NaN": ("dropout", math.nan, ValueError, "dropout is nan, expected a number in"),
    "seed is a float": ("seed", 0.5, ValueError, r"seed is 0.5 \(float\), expected None, a 64-bit integer or an int64"),
    "seed is too large": ("seed", 1 << 63, ValueError, r"seed is 9223372036854775808 \(int\), expected None, a 64-bit"),
    "seed's dtype": ("seed", t(1), ValueError, r"seed is torch.float32 \[1\] on .*, expected one torch.int64 element"),
    "seed's size": ("seed", t(2, dtype=torch.int64), ValueError, r"seed is torch.int64 \[2\] on .*, expected one"),
    "no such backend": ("backend", "cutlass", ValueError, "backend is 'cutlass', expected one of cuda, triton, ref"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_errors(case):
    name, value, error, message = CASES[case]
    if isinstance(value, torch.Tensor):
        value = value.to(DEVICE)
    arguments = {**operands(), "dropout": 0.5, name: value}
    with pytest.raises(error, match=rf"^lora_linear: {message}"):
        lora_linear(**arguments)


def test_rank_0():
    with pytest.raises(ValueError, match=r"^lora_linear: lora_a has r=0, expected r>=1"):
        lora_linear(**operands(r=0))


@pytest.mark.parametrize("name", ["weight", "lora_a", "lora_b", "bias", "seed"])
def test_other_device(name):
    arguments = {**operands(), "dropout": 0.5, "seed": torch.tensor(3, device=DEVICE)}
    arguments[name] = arguments[name].to("meta")
    with pytest.raises(ValueError, match=rf"^lora_linear: {name} is .*on meta, expected .*{DEVICE.type}"):
        lora_linear(**arguments)


def shared(**changed):
    o = operands()
    lists = {"weights": "weight", "lora_as": "lora_a", "lora_bs": "lora_b", "biases": "bias"}
    return {"x": o["x"], **{plural: [o[name]] * 2 for plural, name in lists.items()}, **changed}


@pytest.mark.parametrize("name", ["lora_as", "lora_bs", "biases", "scales", "dropouts", "seeds"])
def test_lists_of_another_length(name):
    with pytest.raises(ValueError, match=rf"^lora_linear_shared: {name} has 3 items, expected 2"):
        lora_linear_shared(**shared(**{name: [1] * 3}))


def test_shared_form_names_its_lists():
    with pytest.raises(ValueError, match=r"^lora_linear_shared: weights\[0\] has K=7, expected K=8"):
        lora_linear_shared(**shared(weights=[torch.ones(6, 7, device=DEVICE)] * 2))
    with pytest.raises(ValueError, match=r"^lora_linear_shared: dropouts\[1\] is 2, expected a number in \[0, 1\)"):
        lora_linear_shared(**shared(dropouts=[0.0, 2]))
    with pytest.raises(ValueError, match=r"^lora_linear_shared: .* has 0 items, expected"):
        lora_linear_shared(torch.ones(3, 8, device=DEVICE), [], [], [])


def test_adapters_of_one_call_share_a_dtype():
    one, other = operands(dtype=FP16), operands(dtype=FP16, adapter=FP32)
    pair = {name: [one[single], other[single]] for name, single in (("lora_as", "lora_a"), ("lora_bs", "lora_b"))}
    with pytest.raises(
        TypeError, match=r"^lora_linear_shared: lora_as\[1\] has dtype torch.float32, expected torch.float16"
    ):
        lora_linear_shared(one["x"], [one["weight"]] * 2, **pair)


# Which backend serves.


def test_automatic_choice_and_explain(monkeypatch):
    monkeypatch.delenv("FASTPEFT_BACKEND", raising=False)
    o = list(operands().values())
    found = fastpeft.explain("lora_linear", *o)
    assert found.backend == ("triton" if DEVICE.type == "cuda" else "reference")  # never the interpreter unasked
    assert "  cuda: " in str(found)
    assert "block_m=" in str(fastpeft.explain("lora_linear", *o, backend="triton"))
    if DEVICE.type == "cpu":
        monkeypatch.setattr("fastpeft._backend.interpreting", lambda: False)
        why = fastpeft.explain("lora_linear", *o).reasons["triton"]
        assert why.startswith("device cpu (on a CPU Triton runs only in its interpreter")
        with pytest.raises(ValueError, match=r"^lora_linear: backend='triton' cannot serve this call: device cpu"):
            lora_linear(*o, backend="triton")


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_explicit_backend_serves(backend, monkeypatch):
    o = list(operands().values())
    monkeypatch.delenv("FASTPEFT_BACKEND", raising=False)
    assert fastpeft.explain("lora_linear", *o, backend=backend).backend == backend
    monkeypatch.setenv("FASTPEFT_BACKEND", backend)
    assert fastpeft.explain("lora_linear", *o).backend == backend
    other = next(name for name in BACKENDS if name != backend)
    assert fastpeft.explain("lora_linear", *o, backend=other).backend == other  # the argument wins


def test_an_explicit_backend_never_falls_back(monkeypatch):
    large = operands(r=MAX_RANK + 1)
    reason = rf"^lora_linear: backend='triton' cannot serve this call: rank {MAX_RANK + 1} > {MAX_RANK}"
    with pytest.raises(ValueError, match=reason):
        lora_linear(**large, backend="triton")
    monkeypatch.setenv("FASTPEFT_BACKEND", "triton")
    with pytest.raises(ValueError, match=reason):
        lora_linear(**large)
    monkeypatch.delenv("FASTPEFT_BACKEND")
    assert lora_linear(**large).shape == (3, 6)  # by the reference
    assert fastpeft.explain("lora_linear", *large.values()).backend == "reference"
    with pytest.raises(ValueError, match=r"^lora_linear: backend='cuda' cannot serve this call: "):
        lora_linear(**operands(), backend="cuda")


def test_the_reason_is_the_sum_of_ranks_that_share_x():
    o = operands(r=MAX_RANK // 2 + 1)
    assert REASONS["triton"](o["x"], [o["lora_a"]]) is None
    assert "rank" in REASONS["triton"](o["x"], [o["lora_a"]] * 2)
