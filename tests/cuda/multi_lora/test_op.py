"""multi_lora with backend="cuda", from the op to the kernel: the launcher layer, on the emulated GPU."""

import pytest
import torch

from fastpeft.cuda import multi_lora as cuda
from fastpeft.ops import multi_lora, multi_lora_, multi_lora_shared
from fastpeft.reference.multi_lora import Slots
from fastpeft.reference.routing import Routing, route
from tests.cuda.emulator import build
from tests.cuda.emulator.multi_lora import Fault
from tests.cuda.emulator.multi_lora_problems import BF16, FP16, each_path, forward, integers

pytestmark = pytest.mark.skipif(build.missing() is not None, reason=f"nothing to emulate with: {build.missing()}")


def routed(p, tile=16):
    return route(p.token_slots, p.lora_as[0].shape[0], tile)


@each_path
def test_the_op_in_place(gpu):
    """Views of one wide y, as engines lay out q, k and v; x in three dimensions."""
    p = integers(20, 40, (45, 30), (12, 9))
    wide = torch.full((20, 100), torch.nan, dtype=BF16)
    views = [wide[:, 3:48], wide[:, 60:90]]
    for view, y in zip(views, p.ys, strict=True):
        view.copy_(y)
    args = p.x, list(p.lora_as), list(p.lora_bs), routed(p), p.scales, p.ranks, "cuda"
    assert multi_lora_(views, *args) is views
    assert all(torch.equal(view, y.to(BF16)) for view, y in zip(views, forward(p), strict=True))
    assert wide.isnan().sum() == 20 * 25
    y = p.ys[0].clone().view(2, 10, 45)
    multi_lora_(y, p.x.view(2, 10, 40), args[1][0], args[2][0], routed(p), p.scales[0], p.ranks[0], "cuda")
    assert torch.equal(y.view(20, 45), forward(p)[0].to(BF16))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the gradients' kernels run in Triton's interpreter")
def test_gradients(gpu):
    """S, which the launch keeps, feeds the Triton kernels: all gradients are exact."""
    p = integers(21, 38, (45, 30), (12, 17), FP16)

    def call(x, *lists):
        return multi_lora_shared(x, lists[0], lists[1], routed(p), p.scales, p.ranks, lists[2], "cuda")

    found, exact = p.differentiate(call), p.exact()
    assert {name for name, value in exact.items() if not torch.equal(found[name], value.to(found[name].dtype))} == set()
    assert len(gpu.calls) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"x": torch.zeros(300, 32, dtype=BF16)}, "300 tokens > 256"),
        ({"dropouts": (0.5, 0.0, 0.0, 0.0)}, "dropout"),
        ({"x": torch.zeros(20, 64, dtype=BF16)[:, ::2]}, "x's last dimension has gaps"),
        ({"lora_b": torch.zeros(4, 8, 24, dtype=BF16).mT}, "lora_b's last dimension has gaps"),
        ({"adapter": torch.float32}, "adapters in torch.float32"),
        ({"rank": 513}, "of 528 > 512"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_it_does_not_serve(gpu, change, said):
    rank, adapter = change.get("rank", 8), change.get("adapter", BF16)
    x = change.get("x", torch.zeros(20, 32, dtype=BF16))
    a = torch.zeros(4, rank, x.shape[1], dtype=adapter)
    b = change.get("lora_b", torch.zeros(4, 24, rank, dtype=adapter))
    slots = torch.zeros(x.shape[0], dtype=torch.int32)
    with pytest.raises(ValueError, match=rf"multi_lora: backend='cuda' cannot serve this call: .*{said}"):
        multi_lora(x, a, b, slots, torch.ones(4), backend="cuda", dropouts=change.get("dropouts"))
    assert gpu.calls == []


def test_a_launcher_refuses_what_it_cannot_hold(gpu):
    p = integers(4, 16, (8,), (8,))
    routing = routed(p)
    with pytest.raises(Fault, match="multi_lora: tile: expected a multiple of 16"):
        cuda.add_([p.ys[0]], p.x, p.lora_as, p.lora_bs, Routing(*routing[:4], 24), Slots(p.scales, p.ranks))


def test_configurations():
    """By capability and shape alone; clusters where they are compiled in, and fit."""
    assert cuda.config(16, 90) == cuda.Config("cluster", 16)
    assert cuda.config(32, 103) == cuda.Config("cluster", 32)
    assert cuda.config(512, 100) == cuda.Config("cluster", 32)
    assert cuda.config(384, 120).path == "cluster"
    assert cuda.config(400, 120).path == "planes"
    assert {cuda.config(16, capability).path for capability in (80, 86, 89, 110)} == {"planes"}
