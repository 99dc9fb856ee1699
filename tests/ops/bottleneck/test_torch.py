"""bottleneck among PyTorch's machinery: opcheck, torch.compile, bad calls, which backend serves; the module."""

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import nn

import fastpeft
from fastpeft import ops
from fastpeft.nn import BottleneckAdapter
from fastpeft.ops.bottleneck import MAX_WIDTH
from fastpeft.testing import BottleneckProblem
from tests.support.backends import BACKENDS, DEVICE, FP16, FP32, FP64

each_backend = pytest.mark.parametrize("backend", BACKENDS)


@each_backend
@pytest.mark.parametrize("norm", [None, "layer"])
@pytest.mark.parametrize("grouped", [False, True])
def test_opcheck(backend, norm, grouped):
    p = BottleneckProblem.make((9, 24), 5, dtype=FP32, device=DEVICE, norm=norm, slots=3 if grouped else None)
    w = {name: t.clone().requires_grad_() for name, t in p.weights.items()}
    weights = [w.get(name) for name in ("down_weight", "down_bias", "up_weight", "up_bias")]
    weights += [None, w.get("norm_weight"), w.get("norm_bias")]
    seed = torch.tensor([3], device=DEVICE)
    tables, tile = (None, None, None), 0
    if grouped:  # every row has an adapter: what is kept for backward is not written elsewhere
        *tables, _, tile = ops.route(p.slots.abs(), 3, 16, backend)
    settings = ("gelu", 0.5, "layer", 1e-5, 0.25, False, tile, backend)
    x, residual = (t.clone().requires_grad_() for t in (p.x, p.residual))
    operands = (*weights, residual, seed, *tables, *settings)
    torch.library.opcheck(torch.ops.fastpeft.bottleneck.default, (x, *operands))
    with torch.no_grad():
        _, kept = torch.ops.fastpeft.bottleneck(x, *operands)
    needs = [True, *(t is not None for t in weights)]
    plain = [t.detach() if isinstance(t, torch.Tensor) else t for t in operands]
    args = (p.dy, x.detach(), kept, *plain[:7], None, *plain[8:], needs)
    torch.library.opcheck(torch.ops.fastpeft.bottleneck_backward.default, args)


@each_backend
@pytest.mark.parametrize("form", ["own", "slots"])
def test_compiled_gradients_are_the_eager_ones(backend, form):
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def function(x, slots, seed, *weights):
        z = x.sin()
        settings = {"norm_weight": weights[4], "norm_bias": weights[5], "dropout": 0.25, "seed": seed}
        slots = ops.route(slots, 3, 16, backend) if slots is not None else None
        return ops.bottleneck(z, *weights[:4], z, "silu", slots=slots, backend=backend, **settings).tanh().sum()

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=graphs)
    compilations = set()
    for rows in (9, 17, 40):
        p = BottleneckProblem.make((rows, 12), 5, device=DEVICE, norm="layer", slots=3 if form == "slots" else None)
        names = ("down_weight", "down_bias", "up_weight", "up_bias", "norm_weight", "norm_bias")
        found = []
        for call in (function, compiled):
            leaves = [t.clone().requires_grad_() for t in (p.x, *(p.weights[name] for name in names))]
            call(leaves[0], p.slots, torch.tensor([7], device=DEVICE), *leaves[1:]).backward()
            found.append([t.grad for t in leaves])
        assert all(map(torch.equal, *found))
        compilations.add(graphs.frame_count)
    assert len(compilations) == 1, "another number of rows was compiled anew"


def arguments(**changes):
    p = BottleneckProblem.make((6, 8), 4, 8, device=DEVICE, norm="layer")
    return {"x": p.x, "residual": p.residual} | p.weights | changes


def t(*shape, dtype=FP32):
    return torch.ones(shape, dtype=dtype, device=DEVICE)


CASES = {
    # argument: (value, error, what the message says)
    "x is a list": ("x", [1.0], TypeError, r"x is a list of 1, expected a tensor \[..., K\]"),
    "x is a scalar": ("x", torch.tensor(1.0), TypeError, r"x is a scalar, expected a tensor"),
    "x is of integers": ("x", t(6, 8, dtype=torch.int32), TypeError, "x has dtype torch.int32"),
    "down's K": ("down_weight", t(4, 9), ValueError, "down_weight has K=9, expected K=8"),
    "down's dimensions": (
        "down_weight",
        t(2, 4, 8),
        ValueError,
        r"down_weight has shape \[2, 4, 8\], expected \[H, K\]",
    ),
    "down's dtype": ("down_weight", t(4, 8, dtype=FP16), TypeError, "down_weight has dtype torch.float16, expected"),
    "no width": ("down_weight", t(0, 8), ValueError, "up_weight has H=4, expected H=0"),
    "up's H": ("up_weight", t(8, 5), ValueError, "up_weight has H=5, expected H=4"),
    "up's dtype": ("up_weight", t(8, 4, dtype=FP64), TypeError, "up_weight has dtype torch.float64, expected"),
    "down_bias": ("down_bias", t(5), ValueError, "down_bias has H=5, expected H=4"),
    "up_bias": ("up_bias", t(5), ValueError, "up_bias has N=5, expected N=8"),
    "norm_weight": ("norm_weight", t(5), ValueError, "norm_weight has K=5, expected K=8"),
    "norm_bias alone": ("norm_weight", None, ValueError, "norm_bias is given without norm_weight"),
    "residual's shape": ("residual", t(6, 9), ValueError, r"residual is \[6, 9\] on .*, expected \[6, 8\]"),
    "residual's dtype": ("residual", t(6, 8, dtype=FP64), TypeError, "residual has dtype torch.float64, expected"),
    "residual is a number": ("residual", 1.0, TypeError, r"residual is 1.0 \(float\), expected None or a tensor"),
    "activation": ("activation", "mish", ValueError, "activation is 'mish', expected one of relu, gelu"),
    "norm": ("norm", "batch", ValueError, "norm is 'batch', expected one of layer, rms"),
    "eps": ("eps", -1.0, ValueError, "eps is -1.0, expected a number of at least 0"),
    "scale is NaN": ("scale", float("nan"), ValueError, "scale is nan, expected a finite number"),
    "scale's size": ("scale", t(5), ValueError, "scale has 5 elements, expected 1 or N=8"),
    "scale's dtype": ("scale", t(8, dtype=FP64), TypeError, "scale has dtype torch.float64, expected torch.float32"),
    "dropout": ("dropout", 1.0, ValueError, r"dropout is 1.0, expected a number in \[0, 1\)"),
    "slots": (
        "slots",
        torch.zeros(6, dtype=torch.int32),
        ValueError,
        r"down_weight has shape \[4, 8\], expected \[S, H",
    ),
    "backend": ("backend", "cpu", ValueError, "backend is 'cpu', expected one of cuda, triton, reference"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_calls_name_what_is_wrong(case):
    name, value, error, message = CASES[case]
    with pytest.raises(error, match=f"bottleneck: {message}"):
        ops.bottleneck(**arguments(**{name: value}))


def test_bad_slots():
    p = BottleneckProblem.make((6, 8), 4, slots=3, device=DEVICE, dropout=0.5)
    operands = {"x": p.x} | p.weights | p.settings
    for slots, message in (
        (p.slots[:5], r"slots is \[5\], expected one slot for each of 6 rows"),
        ([0] * 6, "slots is a list of 6, expected one slot for each of 6 rows"),
        (ops.route(p.slots, 4), "slots was routed for 6 rows, 4 slots"),
    ):
        with pytest.raises(ValueError, match=f"bottleneck: {message}"):
            ops.bottleneck(slots=slots, **operands)
    with pytest.raises(ValueError, match=r"seed is torch.int64 \[2\] .*expected torch.int64 \[1\] or \[3\]"):
        ops.bottleneck(slots=p.slots, **operands | {"seed": torch.zeros(2, dtype=torch.int64, device=DEVICE)})


def test_which_backend_serves():
    x = t(2, 8)
    assert "served by" in str(fastpeft.explain("bottleneck", x, t(4, 8)))
    wide = fastpeft.explain("bottleneck", x, t(MAX_WIDTH + 1, 8))
    assert wide.backend == "reference"
    assert wide.reasons["triton"] == f"width {MAX_WIDTH + 1} > {MAX_WIDTH}"


def by_hand(m: BottleneckAdapter, x, residual):
    """The layers of ``adapters``, sequential and parallel, written down."""
    a = F.layer_norm(x, x.shape[-1:], m.norm_weight, m.norm_bias) if m.norm else x
    u = F.linear(F.silu(F.linear(a, m.down_weight, m.down_bias)), m.up_weight, m.up_bias) * m.scale
    if m.gate_weight is not None:
        gate = torch.sigmoid(F.linear(x, m.gate_weight, m.gate_bias)).mean(dim=1)
        u = u * gate.unsqueeze(-1)

    def after(z):
        return (
            z if m.norm_after_weight is None else F.layer_norm(z, z.shape[-1:], m.norm_after_weight, m.norm_after_bias)
        )

    if m.parallel:
        return after(u) if residual is None else residual + after(u)
    residual = x if residual is None else residual
    return after(u + residual) if m.residual_first else after(u) + residual


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"scale": 4.0, "norm": "layer"},
        {"scale": "learned", "gating": True},
        {"scale": "channel", "norm_after": True},
        {"norm": "layer", "norm_after": True, "residual_first": False, "gating": True},
    ],
    ids=str,
)
def test_the_module_is_the_formula(settings, given, parallel):
    torch.manual_seed(0)
    m = BottleneckAdapter(12, 5, "silu", parallel=parallel, device=DEVICE, **settings)
    for p in m.parameters():
        nn.init.normal_(p)
    x, other = torch.randn(2, 3, 12, device=DEVICE), torch.randn(2, 3, 12, device=DEVICE)
    residual = other if given else None
    torch.testing.assert_close(m(x, residual), by_hand(m, x, residual))


def test_the_modules_parameters():
    m = BottleneckAdapter(12, 5, scale="channel", norm="layer", norm_after=True, gating=True, init="mam")
    shapes = {name: tuple(p.shape) for name, p in m.named_parameters()}
    assert shapes == {
        "down_weight": (5, 12), "down_bias": (5,), "up_weight": (12, 5), "up_bias": (12,), "scale": (12,),
        "norm_weight": (12,), "norm_bias": (12,), "norm_after_weight": (12,), "norm_after_bias": (12,),
        "gate_weight": (1, 12), "gate_bias": (1,),
    }  # fmt: skip
    assert not m.up_weight.any()
    assert (m.scale == 1).all()
    assert (m.norm_weight == 1).all()
    other = BottleneckAdapter(12, 5, scale="channel", norm="layer", norm_after=True, gating=True)
    other.load_state_dict(m.state_dict())
    assert torch.equal(other.down_weight, m.down_weight)
    assert set(BottleneckAdapter(12, 5, bias=False, norm="rms").state_dict()) == {
        "down_weight",
        "up_weight",
        "norm_weight",
    }


@pytest.mark.parametrize("init", ["bert", "mam", "houlsby"])
def test_initialisation(init):
    torch.manual_seed(0)
    m = BottleneckAdapter(400, 100, init=init)
    spread = {"bert": 0.02, "mam": 400**-0.5 / 3**0.5, "houlsby": 0.0088}[init]  # cut at two deviations: 0.88 of one
    assert abs(m.down_weight.std().item() / spread - 1) < 0.05
    assert (m.up_weight == 0).all() if init == "mam" else abs(m.up_weight.std().item() / spread - 1) < 0.05
    assert not m.down_bias.any()
    assert not m.up_bias.any()


def test_dropout_and_stochastic_depth_in_training_only():
    m = BottleneckAdapter(12, 5, dropout=0.5, stochastic_depth=0.5, init="bert")
    x = torch.randn(64, 3, 12)
    assert torch.equal(m.eval()(x), m.eval()(x))
    m.train()
    whole = (m(x) == x).flatten(1).all(1)
    assert 10 < whole.sum() < 54  # samples without a branch
    assert not torch.equal(m(x), m(x))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"features": 0}, "features is 0, expected an integer of at least 1"),
        ({"bottleneck": 2.0}, r"bottleneck is 2.0 \(float\), expected an integer"),
        ({"activation": "mish"}, "activation is 'mish', expected one of relu"),
        ({"scale": "vector"}, "scale is 'vector', expected one of learned, channel"),
        ({"norm": "batch"}, "norm is 'batch', expected one of None, layer, rms"),
        ({"init": "zeros"}, "init is 'zeros', expected one of bert"),
        ({"dropout": 1.5}, "dropout is 1.5, expected a number"),
        ({"stochastic_depth": -0.1}, "stochastic_depth is -0.1, expected a number"),
    ],
    ids=str,
)
def test_bad_modules_name_what_is_wrong(settings, message):
    with pytest.raises(ValueError, match=f"BottleneckAdapter: {message}"):
        BottleneckAdapter(**{"features": 12, "bottleneck": 5} | settings)
