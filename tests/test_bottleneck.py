"""bottleneck: the definition, exactness on integers, accuracy against float64, gradients."""

import pytest
import torch
from backends import BACKENDS, DEVICE, FP32, FP64, TRAINING, served

from fastpeft import reference
from fastpeft.reference.bottleneck import ACTIVATIONS
from fastpeft.testing import BottleneckProblem, assert_no_worse

each_backend = pytest.mark.parametrize("backend", BACKENDS)
# What differs in which kernels run, and which branches within them.
FORMS = {
    "sequential": {"residual": "x"},
    "other residual": {},
    "no residual, other width": {"residual": None, "out": 125},
    "no bias": {"bias": False, "residual": "x"},
    "learned": {"scale": "learned", "residual": None},
    "channel": {"scale": "channel", "residual": "x"},
    "layer": {"norm": "layer", "residual": "x"},
    "rms": {"norm": "rms", "out": 125},
    "rms without bias": {"norm": "rms", "bias": False, "residual": "x"},
    "dropout": {"dropout": 0.3, "residual": "x"},
    "everything": {"scale": "channel", "norm": "layer", "dropout": 0.3, "residual": "x", "activation": "gelu"},
}
form = pytest.mark.parametrize("form", FORMS)
slots = pytest.mark.parametrize("slots", [None, 3], ids=["one adapter", "slots"])


def test_the_definition_element_by_element():
    p = BottleneckProblem.make((5, 7), 3, 6, FP64, norm="layer", scale="channel", activation="silu", dropout=0.5)
    w, seed = p.weights, torch.tensor(9)
    y = reference.bottleneck(p.x, residual=p.residual, **w, **(p.settings | {"seed": seed}))
    keep = reference.keep_mask(seed, 0.5, 5, 6)
    for m in range(5):
        centred = p.x[m] - p.x[m].mean()
        a = centred / torch.sqrt((centred**2).mean() + 1e-5) * w["norm_weight"] + w["norm_bias"]
        z = torch.stack([(a * row).sum() for row in w["down_weight"]]) + w["down_bias"]
        h = z / (1 + torch.exp(-z))
        for n in range(6):
            u = w["scale"][n] * ((h * w["up_weight"][n]).sum() + w["up_bias"][n])
            torch.testing.assert_close(y[m, n], p.residual[m, n] + u * keep[m, n] * 2)


@each_backend
@form
@slots
@pytest.mark.parametrize("activation", ["relu", "identity"])
def test_integers_are_exact(backend, form, slots, activation):
    """Every product and sum of -1, 0 and 1 is exact, whatever its order. A norm's are not."""
    options = FORMS[form] | {"activation": activation}
    if "norm" in options:
        pytest.skip("a norm divides")
    options["dropout"] = 0.5 if "dropout" in options else 0.0
    problem = BottleneckProblem.make((37, 70), 17, dtype=FP32, device=DEVICE, integers=True, slots=slots, **options)
    fused, exact = problem.fused(backend), problem.exact()
    for name, value in exact.items():
        assert torch.equal(fused[name].double(), value), name


@form
@slots
@pytest.mark.parametrize(("backend", "dtype", "wide"), served(*TRAINING))
def test_no_worse_than_eager(form, slots, backend, dtype, wide, record_property):
    problem = BottleneckProblem.make(
        (130, 160), 110, dtype=dtype, weights_dtype=wide, device=DEVICE, slots=slots, **FORMS[form]
    )
    fused, eager, exact = problem.fused(backend), problem.eager(), problem.exact()
    for name in exact:
        if exact[name].numel() < 100:  # ratios are statistics
            continue
        ratios = assert_no_worse(fused[name], eager[name], exact[name], name)
        record_property("ratio", f"{ratios.max:.2f} {ratios.rms:.2f} {name}")


@each_backend
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(backend, activation):
    problem = BottleneckProblem.make((130, 120), 100, dtype=FP32, device=DEVICE, activation=activation, residual="x")
    fused, eager, exact = problem.fused(backend), problem.eager(), problem.exact()
    for name in exact:
        assert_no_worse(fused[name], eager[name], exact[name], name)
