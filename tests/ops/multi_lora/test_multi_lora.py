"""multi_lora, multi_lora_shared: exact on integers, no less accurate than PyTorch, exact gradients, mixed as alone."""

import pytest
import torch

import fastpeft
from fastpeft import reference
from fastpeft.ops.routing import TILES
from fastpeft.testing import MultiLoraProblem, assert_no_worse
from tests.support.backends import BF16, DEVICE, FP16, FP32, FP64, TRAINING, served

FORMS = {"multi_lora": ((141,), (12,)), "multi_lora_shared": ((141, 30, 45), (12, 17, 8))}
form = pytest.mark.parametrize("form", FORMS)
each_tile = pytest.mark.parametrize("tile", TILES)


@form
@each_tile
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize(("backend", "dtype", "adapter"), served())
def test_integers_are_exact(form, tile, backend, dtype, adapter, dropout):
    """No rounding anywhere: a wrong token, slot, rank, scale, mask or bound cannot pass for a rounding error."""
    size = (21, 30) if BF16 in (dtype, adapter) else (75, 150)  # bfloat16 counts to 256
    problem = MultiLoraProblem.make(*size, *FORMS[form], 4, dtype, adapter, DEVICE, dropout, integers=True)
    fused, exact = problem.fused(backend, tile), problem.exact()
    for name, value in exact.items():
        assert torch.equal(value.to(fused[name].dtype).double(), value), f"{name}: the inputs do not make it exact"
        assert torch.equal(fused[name].double(), value), name


@each_tile
def test_integers_are_exact_where_sums_are_cut(tile):
    """K and N long enough for several planes, the last one shorter."""
    kernels = pytest.importorskip("fastpeft.kernels.multi_lora", reason="Triton is not installed")
    k = 300 if tile == 16 else 1100
    assert kernels.planes(k, tile, FP32) > 1
    problem = MultiLoraProblem.make(21, k, (k, 30), (5, 4), 2, FP32, FP32, DEVICE, 0.5, integers=True)
    fused, exact = problem.fused("triton", tile), problem.exact()
    for name, value in exact.items():
        assert torch.equal(fused[name].double(), value), name


@form
@each_tile
@pytest.mark.parametrize(("backend", "dtype", "adapter"), served(*TRAINING))
def test_no_less_accurate_than_pytorch(form, tile, backend, dtype, adapter, record_property):
    tokens = 90 if backend == "triton" and DEVICE.type == "cpu" else 400  # ratios are statistics
    problem = MultiLoraProblem.make(tokens, 300, *FORMS[form], 4, dtype, adapter, DEVICE, dropout=0.1)
    fused, eager, exact = problem.fused(backend, tile), problem.eager(), problem.exact()
    ratios = {name: assert_no_worse(fused[name], eager[name], exact[name], name) for name in exact}
    worst = {kind: max(getattr(r, kind) for r in ratios.values()) for kind in ("max", "rms")}
    record_property("ratio", f"{worst['max']:.2f} max  {worst['rms']:.2f} rms")


@form
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("backend", "dtype", "adapter"), served((FP64, FP64)))
def test_gradcheck(form, backend, dtype, adapter, dropout):
    outs, ranks = ((5,), (3,)) if form == "multi_lora" else ((5, 4), (3, 2))
    p = MultiLoraProblem.make(7, 6, outs, ranks, 2, dtype, adapter, DEVICE, dropout)
    groups = [[t.nan_to_num() for t in group] for group in (p.lora_as, p.lora_bs)] + [p.ys]
    leaves = [t.clone().requires_grad_() for t in (p.x, *(t for group in groups for t in group))]
    count = len(outs)

    def call(x, *flat):
        a, b, y = (flat[i : i + count] for i in range(0, len(flat), count))
        return fastpeft.ops.multi_lora_shared(
            x, a, b, p.token_slots, p.scales, p.ranks, y, backend, dropouts=p.dropouts, seeds=p.seeds
        )

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_definition_is_the_formula(dropout):
    """The reference against a loop over tokens; the mask's rows count the tokens of a slot."""
    p = MultiLoraProblem.make(9, 7, (6,), (5,), 3, FP64, dropout=dropout)
    out = reference.multi_lora(
        p.x, p.lora_as[0], p.lora_bs[0], p.token_slots, p.scales, p.ranks, p.ys[0], p.dropouts, p.seeds
    )
    seen = [0] * 3
    for t, s in enumerate(p.token_slots.tolist()):
        wanted = p.ys[0][t]
        if s >= 0:
            x, rank = p.x[t], int(p.ranks[s])
            if p.dropouts and p.dropouts[s]:
                keep = reference.keep_mask(p.seeds[s], p.dropouts[s], seen[s] + 1, 7)[seen[s]]
                x = x * keep / 0.5
            seen[s] += 1
            low = torch.einsum("k,rk->r", x, p.lora_as[0][s, :rank])
            wanted = wanted + p.scales[s] * torch.einsum("r,nr->n", low, p.lora_bs[0][s, :, :rank])
        torch.testing.assert_close(out[t], wanted)


@form
@each_tile
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("backend", "dtype", "adapter"), served((FP32, FP32), (FP16, FP32)))
def test_every_adapter_trains_as_if_alone(form, tile, backend, dtype, adapter, dropout):
    """Outputs and gradients of one slot, with the others' tokens in the batch and without; from kernels, same bits."""
    p = MultiLoraProblem.make(130, 70, *FORMS[form], 3, dtype, adapter, DEVICE, dropout)
    mixed = p.fused(backend, tile)
    for slot in range(3):
        mine = p.token_slots == slot
        parts = {name: tuple(t[mine] for t in getattr(p, name)) for name in ("ys", "dys")}
        alone = MultiLoraProblem(**{**vars(p), "x": p.x[mine], "token_slots": p.token_slots[mine], **parts})
        for name, value in alone.fused(backend, tile).items():
            found = (mixed[name][slot], value[slot]) if "lora" in name else (mixed[name][mine], value)
            if backend == "reference":  # the library's GEMM sums differently from one alignment to the next
                torch.testing.assert_close(*found)
            else:
                assert torch.equal(*found), (slot, name)


@pytest.mark.parametrize(("backend", "dtype", "adapter"), served((FP32, FP32), (FP64, FP64)))
def test_one_adapter_is_lora_linear(backend, dtype, adapter):
    """Same mask, same formula: training in a mixed batch is training with lora_linear."""
    p = MultiLoraProblem.make(50, 40, (30,), (8,), 2, dtype, adapter, DEVICE)
    mine = p.token_slots == 1
    out = fastpeft.ops.multi_lora(
        p.x, p.lora_as[0], p.lora_bs[0], p.token_slots, p.scales, p.ranks, None, backend,
        dropouts=(0.0, 0.4), seeds=p.seeds,
    )[mine]  # fmt: skip
    rank = int(p.ranks[1])
    a, b = p.lora_as[0][1, :rank], p.lora_bs[0][1, :, :rank]
    absent = torch.zeros(30, 40, dtype=dtype, device=DEVICE)
    alone = fastpeft.ops.lora_linear(
        p.x[mine], absent, a, b, None, float(p.scales[1]), 0.4, int(p.seeds[1]), "reference"
    )
    torch.testing.assert_close(out, alone)
