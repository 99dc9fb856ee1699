"""LoraLinear beside its definition: outputs, gradients, adapters, merging, bases with hooks, meta device, compiling."""

import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastpeft
from fastpeft.nn import LoraAdapter, LoraLinear, share_inputs

M, K, N = 5, 12, 7
EPS = torch.finfo(torch.float64).eps


class Conv1D(nn.Module):
    """transformers' layer without transformers: weight [K, N]."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf) / math.sqrt(nx))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


def base(kind="linear", dtype=torch.float64):
    torch.manual_seed(0)
    layer = Conv1D(N, K) if kind == "conv1d" else nn.Linear(K, N, bias=kind == "linear")
    return layer.to(dtype)


def build(kind="linear", dtype=torch.float64, **settings):
    return LoraLinear(base(kind, dtype), **{"r": 3, "alpha": 6, "init": "random", **settings})


def definition(layer, x, names=("default",)):
    """y = x Wᵀ + bias + Σ scale · (x Aᵀ) Bᵀ + scale · lora_bias, with a scale of its own making."""
    y = layer.base_layer(x)
    for adapter in (layer.adapters[name] for name in names):
        scale = adapter.alpha / (adapter.r**0.5 if adapter.rslora else adapter.r)
        y = y + scale * F.linear(F.linear(x, adapter.lora_A), adapter.lora_B, adapter.lora_bias)
    return y


def close(actual, expected):
    """Both are sums of at most K + r + 2 products; each product and sum rounds once, in either order."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    bound = 4 * (K + N + M) * EPS * max(1.0, expected.abs().max().item()) * 16
    assert (actual - expected).abs().max().item() <= bound


def gradients(y, layer, x):
    parameters = [p for p in layer.parameters() if p.requires_grad]
    grad = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return torch.autograd.grad(y, [x, *parameters], grad)


@pytest.mark.parametrize("kind", ["linear", "no_bias", "conv1d"])
@pytest.mark.parametrize("settings", [{}, {"rslora": True}, {"lora_bias": True}, {"alpha": 0.5, "r": 1}])
def test_output_and_gradients_equal_the_definition(kind, settings):
    layer = build(kind, **settings)
    assert settings.get("r", 3) == layer.adapters["default"].r
    if settings.get("lora_bias"):
        nn.init.normal_(layer.adapters["default"].lora_bias)
    x = torch.randn(2, M, K, dtype=torch.float64, requires_grad=True)
    close(layer(x), definition(layer, x))
    for ours, theirs in zip(gradients(layer(x), layer, x), gradients(definition(layer, x), layer, x), strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", ["alone", "shared", "with another adapter", "base with hooks"])
def test_a_float32_lora_bias_is_not_rounded_to_the_bases_dtype(way, dtype):
    """1 + (0.25 + 0.375) eps is 1 + eps in 16 bits; it is 1 where 1 + 0.25 eps, the two biases, is rounded before."""
    eps = torch.finfo(dtype).eps
    layer = LoraLinear(nn.Linear(K, N).to(dtype), r=1, alpha=1, lora_bias=True)
    adapter = layer.adapters["default"]
    for tensor, value in ((layer.weight, 0), (layer.bias, 1), (adapter.lora_A, 1 / K), (adapter.lora_B, 0.375 * eps)):
        nn.init.constant_(tensor, value)
    nn.init.constant_(adapter.lora_bias, 0.25 * eps)
    if way == "with another adapter":
        layer.add_adapter("zero", r=1)
        layer.set_adapter(["default", "zero"])
    if way == "base with hooks":  # the base's output is 16-bit then: the low-rank term alone is seen in full
        layer.base_layer.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    if way == "shared":
        parent = nn.ModuleDict({"q_proj": layer, "k_proj": copy.deepcopy(layer)})
        (group,) = share_inputs(parent, lambda module: isinstance(module, LoraLinear))
    y = layer(torch.ones(2, K, dtype=dtype))
    assert y.dtype == dtype
    assert torch.equal(y, torch.full_like(y, 0.625 * eps if way == "base with hooks" else 1 + eps))
    if way == "shared":
        assert group.rounds == 1
    y.backward(torch.tensor([[1.0], [0.25 * eps]], dtype=dtype).expand(2, N))
    assert torch.equal(adapter.lora_bias.grad, torch.full((N,), 1 + 0.25 * eps))


def test_transformers_conv1d():
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils", reason="transformers is not installed")
    torch.manual_seed(0)
    conv = pytorch_utils.Conv1D(N, K).double()
    layer = LoraLinear(conv, r=3, init="random")
    x = torch.randn(M, K, dtype=torch.float64)
    close(layer(x), definition(layer, x))
    assert (layer.in_features, layer.out_features) == (K, N)
    assert layer.weight is conv.weight
    assert layer.bias is conv.bias


@pytest.mark.parametrize("kind", ["linear", "no_bias", "conv1d"])
def test_several_adapters_add_up(kind):
    layer = build(kind)
    layer.add_adapter("b", r=5, alpha=1, init="random", lora_bias=True)
    layer.add_adapter("c", r=2, init="random")
    nn.init.normal_(layer.adapters["b"].lora_bias)
    x = torch.randn(M, K, dtype=torch.float64, requires_grad=True)
    for names in (["default"], ["b"], ["default", "b"], ["c", "b", "default"]):
        layer.set_adapter(names)
        close(layer(x), definition(layer, x, names))
        for ours, theirs in zip(
            gradients(layer(x), layer, x), gradients(definition(layer, x, names), layer, x), strict=True
        ):
            close(ours, theirs)
        trained = {name.split(".")[1] for name, p in layer.named_parameters() if p.requires_grad}
        assert trained == set(names)
    layer.set_adapter(["b"], trainable=False)
    assert not any(p.requires_grad for p in layer.parameters())


def test_inactive_is_the_base_to_the_bit():
    layer = build()
    x = torch.randn(M, K, dtype=torch.float64)
    expected = layer.base_layer(x)
    assert not torch.equal(layer(x), expected)
    layer.disabled = True
    assert torch.equal(layer(x), expected)
    layer.disabled = False
    layer.set_adapter([])
    assert torch.equal(layer(x), expected)


def test_starts_as_the_base():
    for init in ("kaiming", "gaussian"):
        layer = build(init=init)
        x = torch.randn(M, K, dtype=torch.float64)
        assert torch.equal(layer(x), layer.base_layer(x))


def test_init():
    torch.manual_seed(0)
    kaiming, gaussian, random = (
        LoraAdapter(400, 300, r=16, init=init, lora_bias=True) for init in fastpeft.nn.adapter.INITS
    )
    # Uniform on (-1/sqrt(K), 1/sqrt(K)): standard deviation 1/sqrt(3 K). 6,400 draws: 3 % is five standard errors.
    for a, std in ((kaiming.lora_A, 1200**-0.5), (random.lora_A, 1200**-0.5), (gaussian.lora_A, 1 / 16)):
        assert abs(a.std().item() / std - 1) < 0.05
    assert kaiming.lora_A.abs().max() <= 400**-0.5
    assert not kaiming.lora_B.any()
    assert not gaussian.lora_B.any()
    assert random.lora_B.abs().min() > 0
    assert not any(adapter.lora_bias.any() for adapter in (kaiming, gaussian, random))


def test_dropout_is_the_reference_with_the_drawn_seed():
    layer = build(dropout=0.4)
    adapter = layer.adapters["default"]
    x = torch.randn(M, K, dtype=torch.float64)
    torch.manual_seed(7)
    seeds = [torch.randint(1 << 62, (1,)) for _ in range(2)]
    torch.manual_seed(7)
    for seed in seeds:
        expected = fastpeft.reference.lora_linear(
            x, layer.weight, adapter.lora_A, adapter.lora_B, layer.bias, adapter.scale, 0.4, seed
        )
        close(layer(x), expected)
        assert (expected - definition(layer, x)).abs().max() > 1e-3
    layer.eval()
    state = torch.get_rng_state()
    close(layer(x), definition(layer, x))
    assert torch.equal(torch.get_rng_state(), state)


def test_several_adapters_have_their_own_masks():
    layer = build(kind="no_bias", dropout=0.5)
    layer.add_adapter("b", r=3, alpha=6, dropout=0.5)
    layer.adapters["b"].load_state_dict(layer.adapters["default"].state_dict())
    layer.set_adapter(["default", "b"])
    x = torch.randn(M, K, dtype=torch.float64)
    torch.manual_seed(3)
    both = layer(x)
    torch.manual_seed(3)
    layer.set_adapter(["default"])
    one = layer(x) - layer.base_layer(x)
    assert (both - layer.base_layer(x) - 2 * one).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_merge_and_unmerge(kind):
    layer = build(kind, lora_bias=True)
    layer.add_adapter("b", r=2, init="random")
    layer.set_adapter(["default", "b"])
    nn.init.normal_(layer.adapters["default"].lora_bias)
    before = {name: p.clone() for name, p in layer.named_parameters()}
    x = torch.randn(M, K, dtype=torch.float64)
    expected = layer(x)
    weight = layer.base_layer.weight
    layer.merge()
    close(layer(x), expected)
    assert torch.equal(layer(x), layer.base_layer(x))
    assert layer.base_layer.weight is weight
    with pytest.raises(ValueError, match="merged"):
        layer.merge()
    with pytest.raises(ValueError, match="merged"):
        layer.set_adapter(["b"])
    layer.unmerge()
    assert all(torch.equal(p, before[name]) for name, p in layer.named_parameters())
    assert torch.equal(layer(x), expected)
    with pytest.raises(ValueError, match="not merged"):
        layer.unmerge()


def test_merged_weights_are_rounded_once():
    layer = build(dtype=torch.bfloat16)
    adapter = layer.adapters["default"]
    assert adapter.lora_A.dtype == torch.float32
    exact = layer.weight.double() + adapter.scale * adapter.lora_B.double() @ adapter.lora_A.double()
    layer.merge()
    # The unit roundoff of bfloat16, plus the float32 product's own rounding.
    assert ((layer.weight.double() - exact).abs() <= exact.abs() * 2**-8 * (1 + 2**-10) + 1e-7).all()


def test_merge_refuses_and_changes_nothing():
    layer = build("no_bias", lora_bias=True)
    weight = layer.weight.clone()
    with pytest.raises(ValueError, match="without bias"):
        layer.merge()
    layer = build()
    with torch.no_grad():
        layer.adapters["default"].lora_B[0, 0] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        layer.merge()
    layer.set_adapter([])
    with pytest.raises(ValueError, match="no active adapter"):
        layer.merge()
    assert torch.equal(layer.weight, weight)
    assert not layer.merged


def test_half_precision_is_no_less_accurate_than_plain_pytorch():
    for dtype in (torch.bfloat16, torch.float16):
        torch.manual_seed(1)
        layer = LoraLinear(nn.Linear(64, 48).to(dtype), r=8, init="random")
        adapter = layer.adapters["default"]
        x = torch.randn(256, 64, dtype=dtype)
        w, b, a, u = (t.double() for t in (layer.weight, layer.bias, adapter.lora_A, adapter.lora_B))
        exact = x.double() @ w.T + b + adapter.scale * (x.double() @ a.T) @ u.T
        plain = layer.base_layer(x) + adapter.scale * F.linear(F.linear(x.float(), adapter.lora_A), adapter.lora_B)
        ours, theirs = (y.to(dtype).double() - exact for y in (layer(x), plain))
        assert ours.abs().max() <= 2 * theirs.abs().max()
        assert ours.square().mean().sqrt() <= 1.2 * theirs.square().mean().sqrt()


@pytest.mark.parametrize(
    ("base_dtype", "adapter_dtype", "found"),
    [
        (torch.bfloat16, None, torch.float32),
        (torch.float16, None, torch.float32),
        (torch.float32, None, torch.float32),
        (torch.float64, None, torch.float64),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float64, torch.float64),
        (torch.float64, torch.float32, torch.float32),
    ],
)
def test_adapter_dtypes(base_dtype, adapter_dtype, found):
    layer = LoraLinear(base(dtype=base_dtype), dtype=adapter_dtype, r=3, init="random")
    adapter = layer.adapters["default"]
    assert adapter.lora_A.dtype == adapter.lora_B.dtype == found
    x = torch.randn(M, K).to(base_dtype).requires_grad_()
    y = layer(x)
    assert y.dtype == base_dtype
    y.sum().backward()
    assert adapter.lora_A.grad.dtype == found
    exact = definition(copy.deepcopy(layer).double(), x.detach().double())
    eps = max(torch.finfo(d).eps for d in (base_dtype, torch.float32 if found == torch.float32 else found))
    assert (y.double() - exact).abs().max() <= 8 * eps * exact.abs().max()


def test_adapters_of_two_dtypes_at_once():
    layer = LoraLinear(base(dtype=torch.bfloat16), r=3, init="random")
    layer.add_adapter("b", dtype=torch.bfloat16, r=3, init="random")
    layer.set_adapter(["b", "default"])
    x = torch.randn(M, K, dtype=torch.bfloat16)
    exact = definition(copy.deepcopy(layer).double(), x.double(), ["b", "default"])
    assert (layer(x).double() - exact).abs().max() <= 8 * 2**-8 * exact.abs().max()


def test_autocast():
    layer = build(dtype=torch.float32)
    x = torch.randn(M, K, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.adapters["default"].lora_A.grad.dtype == x.grad.dtype == torch.float32
    exact = definition(copy.deepcopy(layer).double(), x.detach().double())
    assert (y.double() - exact).abs().max() <= 8 * 2**-8 * exact.abs().max()


class TestBaseOnItsOwnPath:
    """A base that is more than its weight and bias is called, whatever it does."""

    def check(self, layer, expected_of_base, word):
        layer.adapters["default"].requires_grad_(True)
        adapter = layer.adapters["default"]
        x = torch.randn(M, K, dtype=torch.float64, requires_grad=True)
        expected = expected_of_base(x) + adapter.scale * x @ adapter.lora_A.T @ adapter.lora_B.T
        close(layer(x), expected)
        for ours, theirs in zip(gradients(layer(x), layer, x), gradients(expected, layer, x), strict=True):
            close(ours, theirs)
        assert word in layer.fastpeft_report()
        assert word in layer.fastpeft_branch()

    def test_hooks(self):
        layer = build()
        calls = []
        plain = copy.deepcopy(layer.base_layer)
        assert layer.fastpeft_report() == "fused"
        handle = layer.base_layer.register_forward_hook(lambda module, args, y: (calls.append(1), 2 * y)[1])
        self.check(layer, lambda x: 2 * plain(x), "hooks")
        assert calls
        handle.remove()
        assert layer.fastpeft_report() == "fused"

    def test_forward_on_the_instance(self):
        layer = build()
        plain = copy.deepcopy(layer.base_layer)
        layer.base_layer.forward = lambda x: plain(x) + 1
        self.check(layer, lambda x: plain(x) + 1, "overridden")

    def test_parametrised(self):
        class Twice(nn.Module):
            def forward(self, weight):
                return 2 * weight

        layer = build()
        plain = copy.deepcopy(layer.base_layer)
        nn.utils.parametrize.register_parametrization(layer.base_layer, "weight", Twice())
        self.check(layer, lambda x: F.linear(x, 2 * plain.weight, plain.bias), "parametrised")

    def test_several_adapters(self):
        layer = build()
        layer.add_adapter("b", r=2, init="random", lora_bias=True)
        nn.init.normal_(layer.adapters["b"].lora_bias)
        layer.set_adapter(["default", "b"])
        x = torch.randn(M, K, dtype=torch.float64)
        expected = definition(layer, x, ["default", "b"])
        layer.base_layer.register_forward_hook(lambda module, args, y: 3 * y)
        close(layer(x), expected + 2 * F.linear(x, layer.weight, layer.bias))


def test_copy_and_pickle():
    layer = build(dropout=0.1)
    layer.add_adapter("b", r=2)
    layer.eval()
    x = torch.randn(M, K, dtype=torch.float64)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(x), layer(x))
        assert other.adapters["default"].lora_A is not layer.adapters["default"].lora_A
        assert repr(other) == repr(layer)
        with torch.no_grad():
            other.adapters["default"].lora_A.zero_()
        assert not torch.equal(other(x), layer(x))


def test_state_dict():
    layer = build(lora_bias=True)
    layer.add_adapter("b", r=2)
    names = ["base_layer.weight", "base_layer.bias"]
    names += [
        f"adapters.{name}" for name in ("default.lora_A", "default.lora_B", "default.lora_bias", "b.lora_A", "b.lora_B")
    ]
    assert list(layer.state_dict()) == names
    other = LoraLinear(nn.Linear(K, N).double(), r=3, alpha=6, lora_bias=True)
    other.add_adapter("b", r=2)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(M, K, dtype=torch.float64)
    assert torch.equal(other(x), layer(x))


def test_meta_device():
    with torch.device("meta"):
        layer = LoraLinear(nn.Linear(K, N), r=3)
    assert all(p.is_meta for p in layer.parameters())
    assert layer(torch.empty(M, K, device="meta")).shape == (M, N)
    layer.to_empty(device="cpu")
    for module in layer.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    x = torch.randn(M, K)
    assert torch.equal(layer(x), layer.base_layer(x))
    assert layer.adapters["default"].lora_A.any()


def test_follows_the_base():
    assert not LoraLinear(base().eval(), r=2).training
    layer = build()
    assert not layer.base_layer.weight.requires_grad
    assert layer.half().adapters["default"].lora_A.dtype == torch.float16


def test_repr():
    layer = build(dropout=0.25, rslora=True, lora_bias=True)
    assert "in_features=12, out_features=7, active=['default']" in repr(layer)
    assert "r=3, alpha=6, dropout=0.25, rslora=True, lora_bias=True" in repr(layer)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_fullgraph_dynamic(backend):
    torch._dynamo.reset()
    layer = build(dtype=torch.float32)
    layer.add_adapter("b", r=2, init="random", lora_bias=True)
    layer.set_adapter(["default", "b"])
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    for rows in (4, 9):
        x = torch.randn(rows, K, requires_grad=True)
        expected = layer(x)
        for ours, theirs in zip(gradients(compiled(x), layer, x), gradients(expected, layer, x), strict=True):
            assert (ours - theirs).abs().max() <= 64 * torch.finfo(torch.float32).eps * (1 + theirs.abs().max())
        assert (compiled(x) - expected).abs().max() <= 64 * torch.finfo(torch.float32).eps * expected.abs().max()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "LoraAdapter: r is 0, expected an integer of at least 1"),
        ({"r": 2.0}, "r is 2.0"),
        ({"alpha": float("nan")}, "alpha is nan, expected a finite number"),
        ({"dropout": 1.0}, r"dropout is 1.0, expected a number in \[0, 1\)"),
        ({"dropout": -0.1}, "dropout is -0.1"),
        ({"init": "pissa"}, "init is 'pissa', expected one of kaiming"),
        ({"name": "a.b"}, "name is 'a.b'"),
        ({"name": ""}, "name is ''"),
        ({"name": "keys"}, "name is 'keys'"),
        ({"name": "training"}, "name is 'training'"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        LoraLinear(nn.Linear(K, N), **settings)


def test_bad_use():
    for module in (nn.LayerNorm(3), nn.Bilinear(2, 2, 2), type("Linear4bit", (nn.Linear,), {})(3, 3)):
        with pytest.raises(TypeError, match=f"base_layer is a {type(module).__name__}"):
            LoraLinear(module)
    integer = nn.Linear(3, 3)
    integer.weight = nn.Parameter(torch.zeros(3, 3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"torch\.int8 weight"):
        LoraLinear(integer)
    layer = build()
    with pytest.raises(ValueError, match="exists already"):
        layer.add_adapter("default")
    with pytest.raises(ValueError, match="no adapter 'x', expected one of default"):
        layer.set_adapter(["x"])
    with pytest.raises(ValueError, match="weight has K=12, expected K=3"):
        layer(torch.randn(2, 3, dtype=torch.float64))
