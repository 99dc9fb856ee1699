"""Models inside wrappers: attached to, where the wrapper does not mind, else refused with nothing left behind."""

import pytest
import torch
from torch import nn

import fastpeft
from fastpeft import Lora, Selective
from tests.support.small_net import X, attached, build
from tests.support.untouched import assert_untouched, snapshot


def compiled(model):
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize("wrap", [compiled, nn.DataParallel, lambda model: compiled(nn.DataParallel(model))])
@pytest.mark.parametrize("called", [False, True], ids=["new", "called before"])
def test_the_model_inside_is_adapted(wrap, called, tmp_path):
    torch._dynamo.reset()
    inner, expected = build(), attached()(X)
    wrapper = wrap(inner)
    if called:
        assert torch.equal(wrapper(X), build()(X))
    assert attached(model=wrapper) is wrapper
    assert inner.fastpeft_attachment.linears == attached().fastpeft_attachment.linears
    torch.testing.assert_close(wrapper(X), expected)
    fastpeft.attach(wrapper, Lora(r=2), "second")
    fastpeft.save(wrapper, tmp_path)
    with fastpeft.disable_adapter(wrapper):
        torch.testing.assert_close(wrapper(X), build()(X))
    fastpeft.detach(wrapper)
    torch.testing.assert_close(wrapper(X), build()(X))
    fastpeft.load(wrapper, tmp_path)
    torch.testing.assert_close(wrapper(X), expected)


def test_a_selection_is_of_the_model_inside():
    inner = build()
    selection = fastpeft.select(compiled(inner), params=["bias"])
    assert selection.model is inner
    assert selection.revert() is inner


class DistributedDataParallel(nn.Module):
    __module__ = "torch.nn.parallel.distributed"  # the real one needs a process group

    def __init__(self, module):
        super().__init__()
        self.module = module


@pytest.mark.parametrize("name", ["DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"])
@pytest.mark.parametrize("around", [lambda model: model, compiled], ids=["alone", "compiled"])
def test_what_takes_no_more_parameters_is_refused(name, around):
    inner = build()
    kind = type(name, (DistributedDataParallel,), {"__module__": "torch.distributed"})
    before = snapshot(inner)
    what = "attach first, then"
    for run in (
        lambda model: fastpeft.attach(model, Lora()),
        lambda model: fastpeft.attach(model, Selective(params="bias")),
        lambda model: fastpeft.select(model, params="bias"),
    ):
        with pytest.raises(ValueError, match=rf"(attach|select): .* is a {name}, which takes no more .*: {what}"):
            run(around(kind(inner)))
    assert_untouched(inner, before)


def test_distributed_data_parallel(tmp_path):
    """In a group of one process, on the class itself."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(build())
        with pytest.raises(ValueError, match="model is a DistributedDataParallel, .*: attach first, then wrap it"):
            fastpeft.attach(model, Lora())
        outer = nn.parallel.DistributedDataParallel(attached())
        outer(X).square().sum().backward()
        assert all(p.grad is not None for p in outer.parameters() if p.requires_grad)
        with pytest.raises(ValueError, match="is a DistributedDataParallel"):
            fastpeft.attach(outer, Lora(), "second")
    finally:
        torch.distributed.destroy_process_group()


def test_a_scripted_model_is_refused():
    traced = torch.jit.trace(build(), X)
    with pytest.raises(ValueError, match="model is a ScriptModule, .*: attach first, then trace or script it"):
        fastpeft.attach(traced, Lora())


def test_accelerate_inside_wrappers():
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    torch._dynamo.reset()
    model = peft.get_peft_model(build(), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    wrapper = compiled(model)
    expected = wrapper(X)
    assert fastpeft.accelerate(wrapper) is wrapper
    assert fastpeft.report(wrapper).fused == 3
    torch.testing.assert_close(wrapper(X), expected)


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_merge_over_a_weight_that_is_computed_is_refused(norm):
    """The hooks of PyTorch before parametrisations: the weight is no parameter but a new tensor at every call."""
    model = build()
    norm(model.layers[1].out)
    model.eval()  # spectral_norm changes its vectors in training
    before = model(X)
    attached(model=model, targets=["out"])
    y = model(X)
    assert not torch.equal(y, before)
    with pytest.raises(ValueError, match="merge: the weight of layers.1.out is computed anew for each call"):
        fastpeft.merge(model)
    assert torch.equal(model(X), y)
    y.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    fastpeft.detach(model)
    assert torch.equal(model(X), before)
