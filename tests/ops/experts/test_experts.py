"""experts: exact on integers, no less accurate than PyTorch, exact gradients, an expert in the layer as alone."""

from dataclasses import replace

import pytest
import torch

import fastpeft
from fastpeft import reference
from fastpeft.ops.routing import TILES
from fastpeft.testing import ExpertsProblem, assert_no_worse
from tests.support.backends import BF16, DEVICE, FP16, FP32, FP64, TRAINING, served

each_tile = pytest.mark.parametrize("tile", TILES)
RANKS = {"both": (12, 5), "up": (8, None), "down": (None, 3), "neither": (None, None)}


@each_tile
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("ranks", RANKS.values(), ids=RANKS)
@pytest.mark.parametrize(("backend", "dtype", "adapter"), served())
def test_integers_are_exact(ranks, tile, backend, dtype, adapter, dropout):
    """No rounding anywhere: a wrong token, expert, scale, mask or bound cannot pass for a rounding error."""
    size = {BF16: (5, 6, 5), FP16: (9, 12, 6)}.get(dtype, (29, 70, 22))  # bfloat16 counts to 256
    ranks = tuple(rank and min(rank, 2) for rank in ranks) if dtype in (BF16, FP16) else ranks
    settings = {"dtype": dtype, "adapter_dtype": adapter, "device": DEVICE, "dropout": dropout}
    problem = ExpertsProblem.make(*size, ranks=ranks, **settings, integers=True)
    fused, exact = problem.fused(backend, tile), problem.exact()
    for name, value in exact.items():
        assert torch.equal(value.to(fused[name].dtype).double(), value), f"{name}: the inputs do not make it exact"
        assert torch.equal(fused[name].double(), value), name


@each_tile
@pytest.mark.parametrize(("backend", "dtype", "adapter"), served(*TRAINING))
def test_no_less_accurate_than_pytorch(tile, backend, dtype, adapter, record_property):
    """The inner size is the larger one: the router's gradient errs by sqrt(H / I) of eager's."""
    # Ratios are statistics: they want hundreds of numbers, of which biases have too few.
    problem = ExpertsProblem.make(200, 96, 128, 4, 2, (12, 5), dtype, adapter, DEVICE, 0.1, bias=False)
    fused, eager, exact = problem.fused(backend, tile), problem.eager(), problem.exact()
    ratios = {name: assert_no_worse(fused[name], eager[name], exact[name], name) for name in exact}
    worst = {kind: max(getattr(r, kind) for r in ratios.values()) for kind in ("max", "rms")}
    record_property("ratio", f"{worst['max']:.2f} max  {worst['rms']:.2f} rms")


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("ranks", [(3, 2), (3, None), (None, 2)])
@pytest.mark.parametrize(("backend", "dtype", "adapter"), served((FP64, FP64)))
def test_gradcheck(backend, dtype, adapter, dropout, ranks):
    problem = ExpertsProblem.make(7, 6, 4, 4, 2, ranks, dtype, adapter, DEVICE, dropout)
    leaves = problem.leaves()

    def call(*tensors):
        given = dict(zip(leaves, tensors, strict=True))
        up, down = (
            getattr(problem, p)._replace(**{n.partition(".")[2]: t for n, t in given.items() if n.startswith(f"{p}.")})
            for p in ("up", "down")
        )
        return fastpeft.ops.experts(
            given["x"],
            problem.top_k_index,
            given["top_k_weights"],
            up,
            down,
            problem.activation,
            problem.seeds,
            backend,
        )

    assert torch.autograd.gradcheck(call, [t.clone().requires_grad_() for t in leaves.values()], fast_mode=True)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_definition_is_the_formula(dropout):
    """The reference against a loop over tokens and choices; the mask's rows count the tokens of an expert."""
    p = ExpertsProblem.make(9, 7, 4, dtype=FP64, dropout=dropout)
    out = reference.experts(p.x, p.top_k_index, p.top_k_weights, p.up, p.down, p.activation, p.seeds)
    seen = [0] * 5

    def project(x, linear, e, seed):
        y = torch.einsum("k,nk->n", x, linear.weight[e]) + linear.bias[e]
        if dropout:
            x = x * reference.keep_mask(seed, dropout, seen[e] + 1, len(x))[seen[e]] / 0.5
        low = torch.einsum("k,rk->r", x, linear.lora_a[e])
        return y + linear.scale * torch.einsum("r,nr->n", low, linear.lora_b[e])

    for t in range(9):
        wanted = torch.zeros(7, dtype=FP64)
        for e, w in zip(p.top_k_index[t].tolist(), p.top_k_weights[t], strict=True):
            if 0 <= e < 5:
                up_seed, down_seed = (None, None) if p.seeds is None else p.seeds[:, e]
                h = p.activation(project(p.x[t], p.up, e, up_seed)[None])[0]
                wanted += w * project(h, p.down, e, down_seed)
                seen[e] += 1
        torch.testing.assert_close(out[t], wanted)


@each_tile
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("backend", "dtype", "adapter"), served((FP32, FP32), (FP16, FP32)))
def test_every_expert_trains_as_if_alone(tile, backend, dtype, adapter, dropout):
    """Gradients of one expert, with the others' tokens in the batch and with those choices masked."""
    p = ExpertsProblem.make(30, 24, 16, 4, 2, (8, 16), dtype, adapter, DEVICE, dropout)
    mixed = p.fused(backend, tile)
    for e in range(4):
        index = torch.where(p.top_k_index == e, e, -1)
        for name, value in replace(p, top_k_index=index).fused(backend, tile).items():
            if "." in name:
                assert torch.equal(mixed[name][e], value[e]), (e, name)
            elif name == "dtop_k_weights":
                assert torch.equal(mixed[name][index == e], value[index == e])


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_one_expert_is_lora_linear(dropout):
    """Same mask, same formula: a layer of one expert is two LoRA layers around the activation."""
    index = torch.zeros(20, 1, dtype=torch.int64)
    p = ExpertsProblem.make(hidden=12, inner=6, experts=1, dtype=FP64, dropout=dropout, index=index)
    seeds = (None, None) if p.seeds is None else p.seeds[:, 0]

    def layer(x, linear, seed):
        weight, bias, a, b, scale, dropout = linear
        return fastpeft.ops.lora_linear(x, weight[0], a[0], b[0], bias[0], scale, dropout, seed)

    out = layer(p.activation(layer(p.x, p.up, seeds[0])), p.down, seeds[1]) * p.top_k_weights
    torch.testing.assert_close(p.fused("reference")["y"], out)
