"""bottleneck: the definition, exactness on integers, accuracy against float64, gradients."""

from dataclasses import replace

import pytest
import torch

from fastpeft import ops, reference
from fastpeft.ops.routing import TILES
from fastpeft.reference.bottleneck_terms import ACTIVATIONS
from fastpeft.testing import BottleneckProblem, assert_no_worse
from tests.support.backends import BACKENDS, BF16, DEVICE, FP16, FP32, FP64, TRAINING, served
from tests.support.exactness import assert_exact

each_backend = pytest.mark.parametrize("backend", BACKENDS)
# What differs in which kernels run, and which branches within them.
FORMS = {
    "sequential": {"residual": "x"},
    "other residual": {},
    "no residual, other width": {"residual": None, "out": 125},
    "no bias": {"bias": False, "residual": "x"},
    "learned": {"scale": "learned", "residual": None},
    "channel": {"scale": "channel", "residual": "x"},
    "dropout": {"dropout": 0.5, "residual": "x"},
    "layer": {"norm": "layer", "residual": "x"},
    "rms": {"norm": "rms", "out": 125},
    "rms without bias": {"norm": "rms", "bias": False, "residual": "x"},
    "everything": {"scale": "channel", "norm": "layer", "dropout": 0.3, "residual": "x", "activation": "gelu"},
}
EXACT = [name for name, options in FORMS.items() if "norm" not in options]  # a norm divides
# Where z rounds to the other side of relu's kink, one row's error says nothing.
SMOOTH = {"activation": "silu"}
SLOTS = ("sequential", "dropout", "rms", "everything")
form = pytest.mark.parametrize("form", FORMS)


@pytest.fixture(params=["two kernels", "one kernel"])
def path(request, monkeypatch):
    """Few rows go through two kernels; here the same ones through one as well."""
    kernels = pytest.importorskip("fastpeft.kernels.bottleneck", reason="Triton is not installed")
    if request.param == "one kernel":
        monkeypatch.setattr(kernels, "FUSED_BLOCKS", 0)
    return request.param


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


def assert_accurate(problem, backend, record=None, tile=None):
    fused, eager, exact = problem.fused(backend, tile), problem.eager(), problem.exact()
    for name in exact:
        if exact[name].numel() >= 100:  # ratios are statistics
            ratios = assert_no_worse(fused[name], eager[name], exact[name], name)
            if record is not None:
                record("ratio", f"{ratios.max:.2f} {ratios.rms:.2f} {name}")


@each_backend
@pytest.mark.parametrize("form", EXACT)
@pytest.mark.parametrize("slots", [None, 3], ids=["one adapter", "slots"])
def test_integers_are_exact(backend, form, slots):
    """Every product and sum of -1, 0 and 1 is exact, whatever its order."""
    options = {"activation": "relu"} | FORMS[form]
    options["activation"] = "identity" if form == "other residual" else options["activation"]
    assert_exact(
        BottleneckProblem.make((37, 70), 17, dtype=FP32, device=DEVICE, integers=True, slots=slots, **options), backend
    )


@pytest.mark.parametrize("form", EXACT)
def test_integers_are_exact_in_one_kernel(form, path):
    options = FORMS[form] | {"activation": "relu"}
    assert_exact(BottleneckProblem.make((37, 70), 17, dtype=FP32, device=DEVICE, integers=True, **options), "triton")


@form
@pytest.mark.parametrize(("backend", "dtype", "wide"), served(*TRAINING))
def test_no_worse_than_eager(form, backend, dtype, wide, record_property):
    options = SMOOTH | {"dtype": dtype, "weights_dtype": wide, "device": DEVICE, **FORMS[form]}
    assert_accurate(BottleneckProblem.make((67, 104), 36, **options), backend, record_property)


@pytest.mark.parametrize("form", SLOTS)
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("backend", "dtype", "wide"), served(*TRAINING))
def test_slots_are_no_worse_than_eager(form, tile, backend, dtype, wide, record_property):
    options = SMOOTH | {"dtype": dtype, "weights_dtype": wide, "device": DEVICE, "slots": 3, **FORMS[form]}
    assert_accurate(BottleneckProblem.make((97, 104), 36, **options), backend, record_property, tile)


@pytest.mark.parametrize("form", ["layer", "rms", "everything"])
@pytest.mark.parametrize(("backend", "dtype", "wide"), served((FP32, FP32), (FP16, FP16), (BF16, FP32)))
def test_no_worse_in_one_kernel(form, backend, dtype, wide, path):
    options = SMOOTH | {"dtype": dtype, "weights_dtype": wide, "device": DEVICE, **FORMS[form]}
    assert_accurate(BottleneckProblem.make((67, 104), 36, **options), backend)


@each_backend
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(backend, activation):
    options = {"dtype": FP32, "device": DEVICE, "activation": activation, "residual": "x"}
    assert_accurate(BottleneckProblem.make((67, 104), 36, **options), backend)


@each_backend
def test_tanh_near_zero(backend):
    """No residual and no bias hide that 1 - exp(-2z) has few of z's bits there."""
    options = {"dtype": FP32, "device": DEVICE, "activation": "tanh", "residual": None, "bias": False}
    p = BottleneckProblem.make((67, 104), 36, **options)
    assert_accurate(replace(p, x=p.x * 2.0**-10), backend)


@pytest.mark.parametrize("form", ["layer", "rms"])
@each_backend
def test_rows_far_from_zero(backend, form):
    """Means a hundred times the deviation: what is summed before it is centred shows."""
    p = BottleneckProblem.make((67, 104), 20, dtype=FP32, device=DEVICE, **SMOOTH, **FORMS[form])
    assert_accurate(replace(p, x=p.x + 100.0), backend)


@pytest.mark.parametrize(
    ("form", "activation", "slots"),
    [
        ("layer", "silu", None),
        ("layer", "tanh", None),
        ("rms", "gelu_tanh", None),
        ("learned", "leaky_relu", None),
        ("channel", "identity", None),
        ("everything", "gelu", None),
        ("everything", "gelu", 2),
    ],
)
@pytest.mark.parametrize(("backend", "dtype", "wide"), served((FP64, FP64)))
def test_gradients_of_the_kernels_themselves(backend, dtype, wide, form, activation, slots):
    options = FORMS[form] | {"activation": activation, "out": None if FORMS[form].get("residual") == "x" else 9}
    p = BottleneckProblem.make((7, 11), 5, dtype=dtype, device=DEVICE, slots=slots, **options)
    names = list(p.weights)

    def call(x, *weights):
        operands = {"down_bias": None, "up_bias": None} | dict(zip(names, weights, strict=True))
        residual = x if p.residual == "x" else p.residual
        return ops.bottleneck(x=x, residual=residual, slots=p.slots, backend=backend, **operands, **p.settings)

    leaves = [t.clone().requires_grad_() for t in (p.x, *p.weights.values())]
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@each_backend
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("form", ["sequential", "dropout", "everything"])
def test_every_adapter_trains_as_if_alone(backend, tile, form):
    """Outputs and gradients of one slot, with the others' rows in the batch and without; from kernels, same bits."""
    p = BottleneckProblem.make((50, 40), 20, dtype=FP32, device=DEVICE, slots=3, **FORMS[form])
    mixed = p.fused(backend, tile)
    for slot in range(3):
        mine = p.slots == slot
        alone = replace(p, x=p.x[mine], dy=p.dy[mine], slots=p.slots[mine])
        for name, value in alone.fused(backend, tile).items():
            found = (mixed[name][slot], value[slot]) if name[1:] in p.weights else (mixed[name][mine], value)
            if backend == "reference":  # the library's GEMM sums differently from one alignment to the next
                torch.testing.assert_close(*found)
            else:
                assert torch.equal(*found), (slot, name)
    none = p.slots == -1
    assert torch.equal(mixed["y"][none], p.x[none])
    assert torch.equal(mixed["dx"][none], p.dy[none])


@each_backend
def test_one_slot_is_one_adapter(backend):
    """With the same seed a slot draws the mask that the adapter draws without slots."""
    p = BottleneckProblem.make((40, 24), 9, dtype=FP32, device=DEVICE, slots=2, norm="layer", dropout=0.4, residual="x")
    mine = p.slots == 1
    mixed = ops.bottleneck(p.x, slots=p.slots, residual=p.x, backend=backend, **p.weights, **p.settings)
    settings = p.settings | {"seed": int(p.settings["seed"][1])}
    weights = {name: t[1] for name, t in p.weights.items()}
    torch.testing.assert_close(mixed[mine], ops.bottleneck(p.x[mine], residual=p.x[mine], **weights, **settings))
