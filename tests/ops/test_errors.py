"""What every op says of an argument that it cannot take: the op, the argument, the value and its type, what it expects.

``KINDS`` names the kind of each argument of each op, and ``WRONG`` what is no argument of a kind. An argument that no
kind is written down for fails.
"""

import inspect
import math
import re

import pytest
import torch
from torch import Tensor

import fastpeft
from fastpeft import ops
from tests.support.backends import DEVICE

LONG = [0.5] * 100_000
WRONG_TENSORS = [LONG, 3, "x", {}, (1.0,)]
WRONG_INTEGERS = [True, 1.5, "2", torch.tensor(2), [2]]
# What is no value of a kind, and what the error says was expected.
WRONG = {
    "tensor": (WRONG_TENSORS, "expected "),
    "optional tensor": (WRONG_TENSORS, "expected "),
    "tensor or list": ([3, "x", {}, object()], "expected a list"),
    "list of tensors": ([3, "x", {}, torch.ones(2, 2), object()], "expected a list"),
    "number": ([True, "2.0", torch.tensor(2.0), LONG, 1j, math.nan, math.inf, -math.inf], "expected a finite number"),
    "number or tensor": ([True, "2.0", LONG, 1j, math.nan, math.inf, -math.inf], "expected a finite number"),
    "probability": ([True, "0.1", torch.tensor(0.1), LONG, math.nan, -0.1, 1.0], r"expected a number in \[0, 1\)"),
    "seed": ([True, 1.5, "7", LONG, 1 << 63, torch.tensor(1.0)], "expected .*int64"),
    "count": ([*WRONG_INTEGERS, 0, -1], "expected an integer of at least 1"),
    "tile": ([*WRONG_INTEGERS, 17], "expected one of 16, 64"),
    "integer": (WRONG_INTEGERS, "expected an integer"),
    "flag": ([1, "yes", LONG, torch.tensor(True)], "expected True or False"),
    "word": (["nonsense", "x" * 10_000, 3, LONG], "expected one of"),
    "slots": ([LONG, 3, "x"], "expected "),
    "ids": ([*WRONG_TENSORS, torch.ones(2)], "expected an int64 or int32 tensor"),
    "optional integer": ([True, 1.5, "2", torch.tensor(2), [2]], "expected an integer"),
    "list of numbers": ([3, "xy", torch.ones(2)], "expected a list"),
    "base": (WRONG_TENSORS, "expected a fastpeft.ops.Base"),
    "optional dtype": ([*WRONG_INTEGERS, torch.int8], "expected .*dtype"),
    "list of seeds": ([3, "xy", torch.ones(2).long()], "expected a list"),
    "projection": ([LONG, 3, {}, torch.ones(2, 3, 4), (1,)], "expected an ExpertLinear"),
    "function": ([3, "relu", LONG], "expected a function"),
    "seeds of experts": ([3, "xy", LONG, torch.ones(2, 2)], r"expected torch.int64 \[2, 2\]"),
    "table of seeds": ([3, "xy", LONG, torch.ones(3)], r"expected torch.int64 \[2\]"),
}
BACKEND = {"backend": "word"}
LORA = {"x": "tensor", "weight": "tensor", "lora_a": "tensor", "lora_b": "tensor", "bias": "optional tensor"}
SHARED = dict.fromkeys(("weights", "lora_as", "lora_bs", "biases"), "list of tensors")
ROUTED = {"token_slots": "slots", "scales": "tensor", "ranks": "optional tensor"}
MULTI = {"dropouts": "list of numbers", "seeds": "table of seeds", **BACKEND}
KINDS = {
    "bottleneck": {
        "x": "tensor", "down_weight": "tensor", "down_bias": "optional tensor", "up_weight": "tensor",
        "up_bias": "optional tensor", "residual": "optional tensor", "activation": "word", "scale": "number or tensor",
        "norm_weight": "optional tensor", "norm_bias": "optional tensor", "norm": "word", "eps": "number",
        "dropout": "probability", "seed": "seed", "slots": "slots", **BACKEND,
    },
    "dequantise": {"base": "base", "dtype": "optional dtype", **BACKEND},
    "dora_linear": {
        **LORA, "magnitude": "tensor", "scale": "number", "dropout": "probability", "seed": "seed",
        "norm": "optional tensor", **BACKEND,
    },
    "dora_mlp": {
        "x": "tensor", **SHARED, "magnitudes": "list of tensors", "scales": "list of numbers",
        "dropouts": "list of numbers", "seeds": "list of seeds", "norms": "list of tensors", "activation": "word",
        **BACKEND,
    },
    "experts": {
        "x": "tensor", "top_k_index": "tensor", "top_k_weights": "tensor", "up": "projection", "down": "projection",
        "activation": "function", "seeds": "seeds of experts", **BACKEND, "tile": "tile",
    },
    "lora_embedding": {
        "ids": "ids", "table": "optional tensor", "lora_a": "tensor", "lora_b": "tensor", "scale": "number",
        "padding_idx": "optional integer", **BACKEND,
    },
    "lora_linear": {**LORA, "scale": "number", "dropout": "probability", "seed": "seed", **BACKEND},
    "lora_linear_shared": {
        "x": "tensor", **SHARED, "scales": "list of numbers", "dropouts": "list of numbers",
        "seeds": "list of seeds", **BACKEND,
    },
    "lora_mlp": {
        "x": "tensor", **SHARED, "scales": "list of numbers", "dropouts": "list of numbers",
        "seeds": "list of seeds", "activation": "word", **BACKEND,
    },
    "multi_lora": {"x": "tensor", "lora_a": "tensor", "lora_b": "tensor", **ROUTED, "y": "optional tensor", **MULTI},
    "multi_lora_": {
        "y": "tensor or list", "x": "tensor", "lora_a": "list of tensors", "lora_b": "list of tensors",
        **ROUTED, **BACKEND,
    },
    "multi_lora_shared": {
        "x": "tensor", **dict.fromkeys(("lora_as", "lora_bs", "ys"), "list of tensors"), **ROUTED, **MULTI,
    },
    "prompt_gather": {
        "prompts": "tensor or list", "prompt_ids": "tensor or list", "input_ids": "tensor", "embedding": "tensor",
        "inputs_embeds": None, "attention_mask": "optional tensor", "labels": "optional tensor",
        "position_ids": "optional tensor", "lengths": None, "padding_side": "word", "ignore_index": "integer",
        **BACKEND,
    },
    "route": {"token_slots": "tensor", "slots": "count", "tile": "tile", **BACKEND},
    "row_linear": {
        "x": "tensor", "weight": "tensor", "trained": "tensor", "index": "tensor", "bias": "optional tensor",
        "columns": "flag", **BACKEND,
    },
}  # fmt: skip


def t(*shape) -> Tensor:
    return torch.ones(shape, device=DEVICE)


def i(*values) -> Tensor:
    return torch.tensor(values, device=DEVICE)


def arguments(op: str) -> dict:
    """A good call, every argument given that may stand beside the others."""
    multi = {"x": t(3, 8), "token_slots": i(0, 1, -1), "scales": t(2)}
    lists = {"lora_as": [t(2, 4, 8)], "lora_bs": [t(2, 6, 4)], "ys": [t(3, 6)]}
    dropped = {"dropouts": [0.5, 0.0], "seeds": i(1, 2)}
    lora = {"x": t(3, 8), "weight": t(6, 8), "lora_a": t(4, 8), "lora_b": t(6, 4), "bias": t(6)}
    mlp = {
        "x": t(3, 8), "weights": [t(6, 8), t(6, 8), t(8, 6)], "lora_as": [t(4, 8), t(2, 8), t(4, 6)],
        "lora_bs": [t(6, 4), t(6, 2), t(8, 4)], "biases": [t(6), None, t(8)], "scales": [1.0, 2.0, 0.5],
        "dropouts": [0.5, 0.0, 0.5], "seeds": [1, None, 2],
    }  # fmt: skip
    return {
        "bottleneck": {
            "x": t(3, 8), "down_weight": t(4, 8), "down_bias": t(4), "up_weight": t(6, 4), "up_bias": t(6),
            "residual": t(3, 6), "norm_weight": t(8), "norm_bias": t(8), "dropout": 0.5, "seed": 3,
        },
        "dequantise": {"base": ops.eight_bit(torch.ones(6, 8, dtype=torch.int8, device=DEVICE), t(6))},
        "dora_linear": {**lora, "magnitude": t(6), "norm": t(6), "dropout": 0.5, "seed": 3},
        "dora_mlp": {**mlp, "magnitudes": [t(6), t(6), None], "norms": [t(6), None, None]},
        "experts": {
            "x": t(3, 8), "top_k_index": i(0, 1, 1)[:, None], "top_k_weights": t(3, 1), "activation": torch.relu,
            "up": ops.ExpertLinear(t(2, 6, 8), None, t(2, 4, 8), t(2, 6, 4), 1.0, 0.5),
            "down": ops.ExpertLinear(t(2, 8, 6)), "seeds": torch.arange(4, device=DEVICE).view(2, 2),
        },
        "lora_embedding": {"ids": i(2, 0), "table": t(5, 6), "lora_a": t(4, 5), "lora_b": t(6, 4), "padding_idx": 1},
        "lora_linear": {**lora, "dropout": 0.5, "seed": 3},
        "lora_linear_shared": {
            "x": t(3, 8), "weights": [t(6, 8)] * 2, "lora_as": [t(4, 8)] * 2, "lora_bs": [t(6, 4)] * 2,
            "biases": [t(6), None], "scales": [1.0, 2.0], "dropouts": [0.5, 0.0], "seeds": [1, None],
        },
        "lora_mlp": mlp,
        "multi_lora": {**multi, "lora_a": t(2, 4, 8), "lora_b": t(2, 6, 4), "y": t(3, 6), **dropped},
        "multi_lora_": {**multi, "y": [t(3, 6)], "lora_a": [t(2, 4, 8)], "lora_b": [t(2, 6, 4)]},
        "multi_lora_shared": {**multi, **lists, **dropped},
        "prompt_gather": {
            "prompts": [t(2, 4), t(3, 4)], "prompt_ids": [0, None], "input_ids": torch.zeros(2, 5).long().to(DEVICE),
            "embedding": t(7, 4),
        },
        "route": {"token_slots": i(0, 1, -1), "slots": 2},
        "row_linear": {"x": t(3, 8), "weight": t(6, 8), "trained": t(2, 8), "index": i(5, 0), "bias": t(6)},
    }[op]  # fmt: skip


CASES = [
    pytest.param(op, name, value, expected, id=f"{op}-{name}-{type(value).__name__}{n}")
    for op, kinds in KINDS.items()
    for name, kind in kinds.items()
    if kind is not None
    for values, expected in [WRONG[kind]]
    for n, value in enumerate(values)
]


@pytest.mark.parametrize(("op", "name", "value", "expected"), CASES)
def test_what_is_no_argument_is_named_with_its_type(op, name, value, expected):
    """In one line, however large the value is."""
    with pytest.raises((TypeError, ValueError)) as raised:
        getattr(ops, op)(**(arguments(op) | {name: value}))
    said, kind = str(raised.value), KINDS[op][name]
    assert re.match(rf"({op}|route): {name}(\[\d\])? (is|has) .*{expected}", said)
    assert len(said) < 300
    if not isinstance(value, (int, float, Tensor)) and (kind, type(value)) != ("word", str):
        assert type(value).__name__ in said, "the error does not say the type"


def test_every_argument_of_every_op_has_a_kind():
    assert set(KINDS) == set(ops.OPS)
    for op, kinds in KINDS.items():
        assert set(inspect.signature(getattr(ops, op)).parameters) == set(kinds)
        getattr(ops, op)(**arguments(op))  # the call that is spoiled is a good one


# The forms that take lists say which item is wrong.
ITEMS = [
    ("lora_linear_shared", "weights", [t(6, 8), t(6, 7)], r"weights\[1\] has K=7, expected K=8"),
    ("lora_linear_shared", "lora_as", [t(4, 8), LONG], r"lora_as\[1\] is a list of 100000, expected a tensor \[r, K\]"),
    ("lora_linear_shared", "lora_bs", [t(6, 5), t(6, 4)], r"lora_bs\[0\] has r=5, expected r=4"),
    ("lora_linear_shared", "biases", [t(6), t(7)], r"biases\[1\] has N=7, expected N=6"),
    ("lora_linear_shared", "scales", [1.0, "2.0"], r"scales\[1\] is '2.0' \(str\), expected a finite number"),
    ("lora_linear_shared", "dropouts", [0.0, 2], r"dropouts\[1\] is 2, expected a number in \[0, 1\)"),
    ("lora_linear_shared", "seeds", [1, "x"], r"seeds\[1\] is 'x' \(str\), expected None"),
    ("multi_lora_shared", "lora_as", [t(2, 4, 9)], r"lora_as\[0\] has K=9, expected K=8"),
    ("multi_lora_shared", "ys", [t(3, 5)], r"ys\[0\] has N=5, expected N=6"),
    ("multi_lora_shared", "dropouts", [0.5, True], r"dropouts\[1\] is True, expected a number in \[0, 1\)"),
    ("multi_lora_", "lora_b", [t(2, 6, 5)], r"lora_b\[0\] has R=5, expected R=4"),
    ("prompt_gather", "prompts", [t(2, 4), 3], r"prompts\[1\] is 3 \(int\), expected a tensor \[P, D\]"),
    ("prompt_gather", "prompt_ids", [0, "1"], r"prompt_ids\[1\] is '1' \(str\), expected -1 ... 1"),
]


@pytest.mark.parametrize(("op", "name", "value", "message"), ITEMS, ids=[f"{op}-{name}" for op, name, *_ in ITEMS])
def test_an_item_of_a_list_is_named(op, name, value, message):
    with pytest.raises((TypeError, ValueError), match=f"^{op}: {message}"):
        getattr(ops, op)(**(arguments(op) | {name: value}))


def test_numbers_of_numpy_are_numbers():
    np = pytest.importorskip("numpy", reason="numpy is not installed")
    good = arguments("lora_linear")
    wanted = ops.lora_linear(**good | {"scale": 0.5, "dropout": 0.25, "seed": 7})
    found = ops.lora_linear(**good | {"scale": np.float32(0.5), "dropout": np.float16(0.25), "seed": np.int32(7)})
    assert torch.equal(found, wanted)
    wanted, found = ops.route(i(0, 1), 2, 16), ops.route(i(0, 1), np.int64(2), np.uint8(16))
    assert all(map(torch.equal, wanted[:3], found[:3]))
    for name, value in (("scale", np.bool_(True)), ("dropout", np.bool_(False)), ("seed", np.bool_(True))):
        with pytest.raises(ValueError, match=f"^lora_linear: {name} is .*bool"):
            ops.lora_linear(**good | {name: value})


def test_a_wrong_environment_is_named(monkeypatch):
    monkeypatch.setenv("FASTPEFT_BACKEND", "cutlass")
    with pytest.raises(ValueError, match="^lora_linear: FASTPEFT_BACKEND is 'cutlass', expected one of cuda, triton"):
        ops.lora_linear(**arguments("lora_linear"))


# explain


@pytest.mark.parametrize("op", ops.OPS)
def test_every_op_explains_its_call(op, monkeypatch):
    monkeypatch.delenv("FASTPEFT_BACKEND", raising=False)
    found = fastpeft.explain(op, **arguments(op))
    assert (found.op, set(found.reasons) | {found.backend}) == (op, {"cuda", "triton", "reference"})
    lines = [f"{op}: served by {found.backend}", *(f"  {name}: {why}" for name, why in found.reasons.items())]
    configuration = [f"  {line}" for line in found.configuration]
    planned = [] if found.host is None else [f"  calls that repeat: {found.host}"]
    assert str(found).splitlines() == [*lines, *configuration, *planned]
    assert bool(planned) == (op not in ("dequantise", "lora_embedding", "prompt_gather", "route"))
    with pytest.raises(ValueError, match=f"^{op}: backend is 'nonsense', expected one of"):
        fastpeft.explain(op, **arguments(op), backend="nonsense")


@pytest.mark.parametrize("op", ops.OPS)
def test_explain_refuses_what_the_op_has_not(op):
    with pytest.raises(TypeError, match=f"^explain: {op} has no argument 'backen', expected backend$"):
        fastpeft.explain(op, **arguments(op), backen="reference")
    with pytest.raises(TypeError, match=f"^explain: {op}: too many positional arguments"):
        fastpeft.explain(op, *range(40))
    with pytest.raises(TypeError, match=f"^explain: {op} needs "):
        fastpeft.explain(op)


def test_explain_says_what_is_no_tensor():
    with pytest.raises(TypeError, match=r"^explain: x is 'x' \(str\), expected a tensor"):
        fastpeft.explain("lora_linear", "x")
    with pytest.raises(
        ValueError, match="^explain: op is 'lora', expected one of bottleneck, dequantise, dora_linear, dora_mlp"
    ):
        fastpeft.explain("lora")
